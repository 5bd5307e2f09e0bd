"""The gate between two resolutions: never, always, and by the entropy of the first token."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgevlm_runtime import Bundle, InputError, ResolutionGate, Session
from edgevlm_runtime.completion import Completion
from edgevlm_runtime.sample import entropy
from tests.runtime.bundles import write_toy

PICTURES = [
    np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in range(6)
]
QUESTION = "what is it?"


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Session]:
    """Two toys of other weights, which answer otherwise."""
    folder = tmp_path_factory.mktemp("gate")
    low, full = (write_toy(folder / str(seed), seed=seed, max_new_tokens=9) for seed in (3, 4))
    return Session(Bundle.open(low)), Session(Bundle.open(full))


def same(ours: Completion, theirs: Completion) -> bool:
    """Equal but for how long it took."""
    return (ours.text, ours.tokens, ours.finish_reason, ours.entropy) == (
        theirs.text,
        theirs.tokens,
        theirs.finish_reason,
        theirs.entropy,
    )


def test_a_gate_that_never_fires_is_the_low_session(sessions: tuple[Session, Session]) -> None:
    low, full = sessions
    gate = ResolutionGate(low, full, math.inf)
    for picture in PICTURES:
        found = gate.generate(QUESTION, [picture])
        wanted = low.generate(QUESTION, [picture])
        assert same(found.completion, wanted)
        assert (found.answered, found.full_ms, found.entropy) == ("low", None, wanted.entropy)
        assert found.total_ms == found.low_ms > 0


def test_a_gate_that_always_fires_is_the_full_session(sessions: tuple[Session, Session]) -> None:
    low, full = sessions
    gate = ResolutionGate(low, full, -1.0)
    for picture in PICTURES:
        found = gate.generate(QUESTION, [picture])
        wanted, before = (s.generate(QUESTION, [picture]) for s in (full, low))
        assert same(found.completion, wanted)
        assert not same(wanted, before)
        assert (found.answered, found.entropy) == ("full", before.entropy)
        assert found.full_ms is not None
        assert found.total_ms == found.low_ms + found.full_ms


def test_a_threshold_parts_the_questions(sessions: tuple[Session, Session]) -> None:
    low, full = sessions
    known = [low.generate(QUESTION, [picture]).entropy or 0.0 for picture in PICTURES]
    # Between the third and the fourth: well apart, so that it is no tie.
    threshold = float(np.mean(sorted(known)[2:4]))
    assert sorted(known)[3] - sorted(known)[2] > 1e-3
    gate = ResolutionGate(low, full, threshold)
    answered = [gate.generate(QUESTION, [picture]).answered for picture in PICTURES]
    assert answered == ["full" if surprise > threshold else "low" for surprise in known]
    assert sorted(answered) == ["full"] * 3 + ["low"] * 3


def test_arguments_go_to_whoever_answers(sessions: tuple[Session, Session]) -> None:
    low, full = sessions
    options = {"max_new_tokens": 4, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 5}
    for session, threshold in ((low, math.inf), (full, -1.0)):
        found = ResolutionGate(low, full, threshold).generate(
            QUESTION,
            PICTURES[:1],
            **options,  # type: ignore[arg-type]
        )
        wanted = session.generate(QUESTION, PICTURES[:1], **options)  # type: ignore[arg-type]
        assert same(found.completion, wanted)
        assert len(wanted.tokens) == 4


def test_without_a_picture_nothing_can_be_seen_better(sessions: tuple[Session, Session]) -> None:
    low, full = sessions
    found = ResolutionGate(low, full, -1.0).generate(QUESTION)
    assert found.answered == "low"
    assert same(found.completion, low.generate(QUESTION))


def test_a_session_is_let_go_of(sessions: tuple[Session, Session]) -> None:
    """Whether it answered or not, it may be asked again at once."""
    low, full = sessions
    for threshold in (-1.0, math.inf):
        ResolutionGate(low, full, threshold).generate(QUESTION, PICTURES[:1])
        for session in sessions:
            assert session.generate(QUESTION, max_new_tokens=1).tokens


def test_a_gate_that_was_cancelled_asks_nobody_else(
    sessions: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    low, full = sessions
    gate = ResolutionGate(low, full, -1.0)
    fires = gate._fires

    def cancelled(surprise: float | None) -> bool:
        gate.cancel()
        return fires(surprise)

    monkeypatch.setattr(gate, "_fires", cancelled)
    found = gate.generate(QUESTION, PICTURES[:1])
    assert (found.answered, found.completion.finish_reason) == ("low", "cancelled")


def test_a_cancel_between_the_two_reaches_the_second(
    sessions: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    low, full = sessions
    gate = ResolutionGate(low, full, -1.0)
    stream = full.stream

    def late(*arguments: object, **options: object) -> object:
        gate.cancel()  # full has not begun, and does not hear it
        return stream(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(full, "stream", late)
    found = gate.generate(QUESTION, PICTURES[:1])
    assert (found.answered, found.completion.finish_reason) == ("full", "cancelled")


@pytest.mark.parametrize(
    ("threshold", "twice", "message"),
    [
        (
            math.nan,
            False,
            "threshold is not a number\n  hint: give an entropy in nats, such as 0.5",
        ),
        (
            0.5,
            True,
            "both sessions are one\n  hint: open a session for each of the two resolutions",
        ),
    ],
)
def test_refusals(
    sessions: tuple[Session, Session], threshold: float, twice: bool, message: str
) -> None:
    low, full = sessions
    with pytest.raises(InputError) as error:
        ResolutionGate(low, low if twice else full, threshold)
    assert str(error.value) == message


def test_events_and_completions_say_the_entropy(sessions: tuple[Session, Session]) -> None:
    low, _ = sessions
    events = list(low.stream(QUESTION, PICTURES[:1]))
    decoder = low.decoder
    decoder.rewind(0)
    logits = decoder.prefill(low.encode(QUESTION, PICTURES[:1])).logits[0].astype(np.float64)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    wanted = -(shares * np.log(shares)).sum()
    # Sums of 400 numbers in float32.
    assert events[0].entropy == pytest.approx(wanted, abs=1e-5)
    assert {event.entropy for event in events} == {events[0].entropy}
    completion = events[-1].completion
    assert completion is not None
    assert completion.entropy == events[0].entropy


@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        ([2.0] * 8, math.log(8)),
        ([0.0, -1000.0, -np.inf], 0.0),
        ([90.0, 90.0, -np.inf, -200.0], math.log(2)),
        ([0.0, math.log(3.0)], -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))),
    ],
)
def test_entropy(logits: list[float], wanted: float) -> None:
    # Rounding of float32.
    assert entropy(np.array(logits, np.float32)) == pytest.approx(wanted, abs=1e-6)
