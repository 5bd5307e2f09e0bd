"""A rung held to its gates: what passes, what fails, and what the error says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from edgevlm.errors import EvidenceError
from edgevlm.evidence.bisect import Divergence
from edgevlm.evidence.gates import Bound, limits
from edgevlm.evidence.ladder import demand
from edgevlm.evidence.rung import Rung, compare
from edgevlm.evidence.witness import Witness, load, save
from edgevlm.recipe import EvidenceOptions, Gates

OPTIONS = EvidenceOptions()


def witness(answer: Sequence[int], *, noise: float = 0.0, margin: float = 1.0) -> Witness:
    """An answer whose every token leads the next best by `margin`, token 0, in 8 logits."""
    random = np.random.default_rng(len(answer))
    logits = np.full((len(answer), 8), -5.0, np.float32)
    logits[:, 0] = 4.0 - margin
    logits[np.arange(len(answer)), answer] = 4.0
    logits += noise * random.standard_normal(logits.shape).astype(np.float32)
    rows = random.standard_normal((4, 3)).astype(np.float32)
    return Witness(vision=(rows,), projector=(rows + noise,), answer=tuple(answer), logits=logits)


def rung(
    kind: str,
    reference: Sequence[Witness],
    ours: Sequence[Witness],
    *,
    scored: tuple[float | None, float | None] | None = None,
) -> Rung:
    theirs, mine = [{"mean_accuracy": score} for score in scored] if scored else [{}, {}]
    return compare(
        "static",
        kind=kind,
        parent="ours",
        reference=reference,
        ours=ours,
        root=reference,
        bounds=limits(OPTIONS)[kind],
        accuracy=mine,
        root_accuracy=theirs,
    )


def failures(measured: Rung) -> set[str]:
    return {gate.name for gate in measured.failed}


def test_equal_witnesses_pass_every_gate() -> None:
    reference = [witness([1, 2, 3]), witness([4, 5])]
    measured = rung("graph", reference, reference)
    assert failures(measured) == set()
    assert {gate.name for gate in measured.gates} >= {
        "vision.max_error",
        "projector.cosine",
        "decoder.kl",
        "decoder.flips",
        "tokens.token_agreement",
    }


def test_errors_are_held_against_the_kind_of_rung() -> None:
    reference = [witness([1, 2, 3])]
    ours = [witness([1, 2, 3], noise=3e-4)]
    # Our eager model must be within 1e-4, a graph within the recipe's 1e-3.
    assert {"projector.max_error", "decoder.max_error"} <= failures(rung("model", reference, ours))
    assert failures(rung("graph", reference, ours)) == set()


def test_a_flip_fails_and_a_tie_does_not() -> None:
    reference = [witness([1, 2, 3])]
    assert failures(rung("graph", reference, [witness([1, 0, 3])])) >= {
        "decoder.flips",
        "tokens.flips",
    }
    tied = [witness([1, 2, 3], margin=5e-5)]
    turned = Witness(
        vision=tied[0].vision,
        projector=tied[0].projector,
        answer=(1, 0),
        logits=tied[0].logits + np.float32([1e-4, 0, 0, 0, 0, 0, 0, 0]),
    )
    measured = rung("graph", tied, [turned])
    assert failures(measured) == set()
    assert measured.tokens is not None
    assert (measured.tokens.ties, measured.tokens.flips) == (1, 0)
    assert measured.decoder is not None
    assert (measured.decoder.ties, measured.decoder.flips) == (3, 0)


def test_nan_fails() -> None:
    reference = [witness([1, 2, 3])]
    broken = witness([1, 2, 3])
    broken.logits[1, 1] = np.nan
    assert {"decoder.max_error", "decoder.kl"} <= failures(rung("graph", reference, [broken]))


def test_a_loosened_bound_keeps_its_reason_and_our_model_its_own_bound() -> None:
    gates = Gates(max_error=0.5, cosine=0.9)
    bounds = limits(EvidenceOptions(gates=gates, reason="int4 weights"))
    assert bounds["graph"]["max_error"] == Bound(value=0.5, reason="int4 weights")
    assert bounds["model"]["max_error"] == Bound(value=1e-4, reason=None)
    assert bounds["graph"]["kl"] == Bound(value=1e-4, reason=None)


def test_a_drop_of_accuracy_fails() -> None:
    reference = [witness([1, 2])]
    assert failures(rung("runtime", reference, reference, scored=(0.9, 0.89))) == {
        "tasks.accuracy_drop"
    }
    assert failures(rung("runtime", reference, reference, scored=(0.9, 0.9))) == set()
    # Boxes and descriptions alone have no mean, and nothing to drop.
    assert failures(rung("runtime", reference, reference, scored=(None, None))) == set()


@pytest.mark.parametrize(
    ("locate", "message", "hint"),
    [
        (
            lambda: Divergence(site="decoder.norm", error=0.25, before="decoder.head", runs=3),
            "; the first diverging site is 'decoder.norm' (error 0.25 std)",
            "the last site that agrees is 'decoder.head'",
        ),
        (
            lambda: Divergence(site="vision.embed", error=0.25, before=None, runs=3),
            "; the first diverging site is 'vision.embed' (error 0.25 std)",
            "it is the first site of its graph",
        ),
        (
            lambda: None,
            "",
            "no single site diverges: look at preprocessing, positions and state",
        ),
    ],
)
def test_a_failing_gate_is_an_error_that_says_where(
    locate: Callable[[], Divergence | None], message: str, hint: str
) -> None:
    spoken = Witness(vision=(), projector=(), answer=(1, 3), logits=np.zeros((0, 1), np.float32))
    measured = rung("runtime", [witness([1, 2])], [spoken])
    with pytest.raises(EvidenceError) as failed:
        demand(measured, locate)
    assert str(failed.value) == (
        "static is not ours: tokens.token_agreement is 0, allowed at least 0.995"
        f"{message}\n  hint: {hint}"
    )


def test_a_rung_that_holds_raises_nothing() -> None:
    reference = [witness([1, 2])]
    demand(rung("graph", reference, reference), lambda: pytest.fail("nothing is to be located"))


def test_witnesses_survive_being_kept() -> None:
    kept = [witness([1, 2, 3]), witness([4])]
    for before, after in zip(kept, load(save(kept)), strict=True):  # type: ignore[arg-type]
        assert before.answer == after.answer
        np.testing.assert_array_equal(before.logits, after.logits)
        np.testing.assert_array_equal(before.vision[0], after.vision[0])
