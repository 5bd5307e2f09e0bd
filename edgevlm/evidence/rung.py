"""A rung: one form of the model, what it was measured against, and whether its gates hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgevlm.evidence.gates import Bound, Gate, judge
from edgevlm.evidence.measures import (
    LogitsAgreement,
    TensorAgreement,
    TokenAgreement,
    logits_agreement,
    margins,
    tensor_agreement,
    token_agreement,
)
from edgevlm.evidence.witness import Witness


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One form of the model against its parent.

    `kind` is `reference`, `model`, `graph` or `runtime`; `vision`, `projector` and `decoder` are
    None where this rung does not show that component by itself. `accuracy` is `mean_accuracy` and
    `tasks`, empty where a right answer means nothing.
    """

    name: str
    parent: str | None
    kind: str
    vision: TensorAgreement | None = None
    projector: TensorAgreement | None = None
    decoder: LogitsAgreement | None = None
    tokens: TokenAgreement | None = None
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()

    @property
    def figures(self) -> dict[str, float]:
        """What gates are held against, by component and name."""
        parts = {"vision": self.vision, "projector": self.projector, "decoder": self.decoder}
        return {
            f"{part}.{name}": value
            for part, agreement in parts.items()
            if agreement is not None
            for name, value in agreement.figures.items()
        }

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that do not hold."""
        return tuple(gate for gate in self.gates if not gate.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        data = asdict(self)
        for part in ("vision", "projector", "decoder"):
            agreement = getattr(self, part)
            if agreement is not None:
                data[part]["relative_error"] = agreement.relative_error
        for gate, entry in zip(self.gates, data["gates"], strict=True):
            entry["passed"] = gate.passed
        return data


def compare(
    name: str,
    *,
    kind: str,
    parent: str,
    reference: Sequence[Witness],
    ours: Sequence[Witness],
    root: Sequence[Witness],
    bounds: Mapping[str, Bound],
    accuracy: Mapping[str, Any],
    root_accuracy: Mapping[str, Any],
) -> Rung:
    """Measure a rung's witnesses against its parent's; tokens and accuracy against the root's.

    Ties are counted and shown, and no gate fails on them.
    """
    vision = projector = None
    # Of fewer visual tokens there is nothing to compare with those of the parent.
    if kind != "reduced":
        vision = _tensors(reference, ours, "vision", "vision")
        # A graph of both components feeds its projector itself.
        is_graph = kind == "graph" and any(witness.chained for witness in reference)
        projector = _tensors(reference, ours, "chained" if is_graph else "projector", "projector")
    decoder = None
    if all(len(witness.logits) for witness in ours):
        decoder = logits_agreement([w.logits for w in reference], [w.logits for w in ours])
    tokens = token_agreement(
        [w.answer for w in root], [margins(w.logits) for w in root], [w.answer for w in ours]
    )
    parts = {"vision": vision, "projector": projector, "decoder": decoder, "tokens": tokens}
    measured = {
        f"{part}.{name}": value
        for part, agreement in parts.items()
        if agreement is not None
        for name, value in agreement.figures.items()
    }
    theirs, mine = root_accuracy.get("mean_accuracy"), accuracy.get("mean_accuracy")
    if theirs is not None and mine is not None:
        measured["tasks.accuracy_drop"] = theirs - mine
    return Rung(
        name=name,
        parent=parent,
        kind=kind,
        vision=vision,
        projector=projector,
        decoder=decoder,
        tokens=tokens,
        accuracy=accuracy,
        gates=judge(measured, bounds),
    )


def _tensors(
    reference: Sequence[Witness], ours: Sequence[Witness], theirs: str, part: str
) -> TensorAgreement | None:
    want = [array for witness in reference for array in getattr(witness, theirs)]
    got = [array for witness in ours for array in getattr(witness, part)]
    return tensor_agreement(want, got) if want and got else None
