"""Verdicts: the precision that was asked for, held against the one that was realised.

    as asked       the same
    finer          values are at least as fine, and weights take no more bits
    coarser        some values are coarser
    not realised   what was asked for did not happen: weights take more bits, or products that were
                   to be of eight bits are of floats
    not asked      nobody asked, and it is float

Fewer bits are asked of weights for their bytes, of activations for the products; finer values in
their place are a loss there. An `emulated` precision is asked for its rounding alone: weights are
then those of the file, and floats where others were asked are a loss.
"""

from __future__ import annotations

from dataclasses import replace

from edgevlm.audit.precision import Precision, at_least_as_fine, bits, can_repeat
from edgevlm.audit.report import AS_ASKED, COARSER, FINER, NOT_ASKED, NOT_REALISED
from edgevlm.audit.rules import Realised
from edgevlm.audit.weights import Weights

__all__ = ["as_judged", "judge", "judge_unasked"]

_RANKED = (AS_ASKED, FINER, COARSER, NOT_REALISED)
_FLOATS = frozenset(("", "float32", "float16", "bfloat16"))
_PRODUCT_BITS = 8  # activations of so many bits are asked for products of integers, or of float8

Verdict = tuple[str, str]


def judge(asked: Precision, realised: Realised, filed: Weights | None) -> Verdict:
    """The outcome and its cause; `filed` are the weights of the op in the written file."""
    columns = realised.weights.columns if realised.weights is not None else None
    want, have = asked.over(columns), as_judged(asked, realised, filed).over(columns)
    verdicts = [
        *_weights(want, have, realised, filed),
        *_activations(want, have, realised),
        *_state(want, have),
    ]
    outcome = max((outcome for outcome, _ in verdicts), key=_RANKED.index, default=AS_ASKED)
    return outcome, "; ".join(clause for _, clause in verdicts)


def as_judged(asked: Precision, realised: Realised, filed: Weights | None) -> Precision:
    """What is held against `asked`: of an emulated op, the weights of the file."""
    if not asked.emulated:
        return realised.precision
    have = replace(realised.precision, emulated=True)
    if filed is None:
        return have
    return replace(have, weights=filed.dtype, weight_granularity=filed.granularity)


def judge_unasked(realised: Realised) -> Verdict:
    """The verdict on an op that nobody asked for anything: it is to be of floats."""
    have = realised.precision
    if {have.weights, have.activations, have.state} <= _FLOATS:
        return NOT_ASKED, ""
    return COARSER, f"{realised.kernel} is {have}, and nobody asked for it"


def _weights(
    want: Precision, have: Precision, realised: Realised, filed: Weights | None
) -> list[Verdict]:
    if not want.weights:
        return []
    if not have.weights:
        return [(NOT_REALISED, f"no constant weights, asked {want.weights}")]
    if have.weights != want.weights:
        clause = f"weights are {have.weights}, asked {want.weights}"
        if filed is not None:
            made = f"onnxruntime made them of the {filed.dtype} in the file"
            clause += f": {'so the file has them' if filed.dtype == have.weights else made}"
        return [(NOT_REALISED if bits(have.weights) > bits(want.weights) else COARSER, clause)]
    if filed is not None and filed.granularity == "input" != have.weight_granularity:
        # Where K is N, ONNX Runtime 1.31 fuses such products without looking at the axis.
        clause = "the file has a scale for each input of the weights, and onnxruntime multiplies "
        return [(NOT_REALISED, f"{clause}outputs by them: a wrong product")]
    held = realised.weights
    if held is not None and held.expanded_by and not want.emulated:
        clause = f"{held.expanded_by!r} expands the {have.weights} weights to floats in every call"
        return [(NOT_REALISED, clause)]
    return _scales("weights", have.weight_granularity, want.weight_granularity)


def _activations(want: Precision, have: Precision, realised: Realised) -> list[Verdict]:
    if not want.activations or not have.activations:
        return []  # rows of a table are looked up, not multiplied
    clause = f"{realised.kernel} multiplies {have.activations}, asked {want.activations}"
    if want.emulated:
        clause = f"activations are {have.activations}, asked {want.activations}"
    eight = bits(want.activations) <= _PRODUCT_BITS
    if eight and not want.emulated and realised.computes_in == "float32":
        if have.activations == want.activations:
            clause = f"{realised.kernel} multiplies float32, of activations rounded to "
            clause += want.activations
        return [(NOT_REALISED, clause)]
    if have.activations != want.activations:
        if not at_least_as_fine(have.activations, want.activations):
            return [(COARSER, clause)]
        return [(NOT_REALISED if want.emulated else FINER, clause)]
    if not want.activation_granularity:
        return []
    found = _scales("activations", have.activation_granularity, want.activation_granularity)
    if have.dynamic == want.dynamic:
        return found
    here, there = (
        "found in every call" if dynamic else "constant" for dynamic in (have.dynamic, want.dynamic)
    )
    outcome = FINER if have.dynamic and found and found[0][0] == FINER else COARSER
    return [*found, (outcome, f"scales of activations are {here}, asked {there}")]


def _state(want: Precision, have: Precision) -> list[Verdict]:
    if not want.state:
        return []
    if have.state != want.state:
        clause = f"the cache is {have.state or 'not there'}, asked {want.state}"
        more = not have.state or bits(have.state) > bits(want.state)
        return [(NOT_REALISED if more else COARSER, clause)]
    return _scales("the cache", have.state_granularity, want.state_granularity)


def _scales(what: str, have: str, want: str) -> list[Verdict]:
    if not want or have == want:
        return []
    clause = f"scales of {what} are per {_words(have)}, asked per {_words(want)}"
    if not have:
        return [(COARSER, f"scales of {what} are not known, asked per {_words(want)}")]
    return [(FINER if can_repeat(have, want) else COARSER, clause)]


def _words(granularity: str) -> str:
    return granularity.replace("group:", "group of ")
