"""How far two runs of one thing are apart: errors of tensors, agreement of logits and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_DB = 200.0
"""Beyond this two tensors are the same; float32 differs at 140."""

TIE_MARGIN = 1e-4
"""Two top logits closer than this are a tie: float32 rounding may order them either way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorAgreement:
    """One tensor against its reference: largest error, the reference's spread, direction, noise.

    `sqnr_db` is 10 log10(sum want^2 / sum (want - got)^2), at most `MOST_DB`.
    """

    max_error: float
    std: float
    cosine: float
    sqnr_db: float

    @property
    def relative_error(self) -> float:
        """The largest error in units of max(1, std of the reference)."""
        return self.max_error / max(1.0, self.std)

    @property
    def figures(self) -> dict[str, float]:
        """What gates are held against, by their names."""
        return {"max_error": self.relative_error, "cosine": self.cosine, "sqnr_db": self.sqnr_db}


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsAgreement:
    """Rows of logits against reference rows.

    `kl` is the mean of KL(reference || ours) in nats, `argmax` the share of rows whose best token
    is the same; a row that differs counts in `ties` where the reference's two best logits lie
    within `TIE_MARGIN`, else in `flips`.
    """

    max_error: float
    std: float
    cosine: float
    kl: float
    argmax: float
    rows: int
    ties: int
    flips: int

    @property
    def relative_error(self) -> float:
        """The largest error in units of max(1, std of the reference)."""
        return self.max_error / max(1.0, self.std)

    @property
    def figures(self) -> dict[str, float]:
        """What gates are held against, by their names; a tie counts as agreement."""
        return {
            "max_error": self.relative_error,
            "cosine": self.cosine,
            "kl": self.kl,
            "argmax_agreement": 1.0 - self.flips / self.rows,
            "flips": float(self.flips),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenAgreement:
    """Greedy answers against the reference's: how many are the same token for token.

    An answer that differs counts in `ties` where it parts at a row whose two best reference logits
    lie within `TIE_MARGIN` (from there on the two prompts differ), else in `flips`.
    """

    answers: int
    identical: int
    ties: int
    flips: int

    @property
    def figures(self) -> dict[str, float]:
        """What gates are held against, by their names; a tie counts as agreement."""
        return {
            "token_agreement": 1.0 - self.flips / self.answers,
            "flips": float(self.flips),
        }


def tensor_agreement(
    reference: Sequence[NDArray[np.float32]], ours: Sequence[NDArray[np.float32]]
) -> TensorAgreement:
    """Compare tensors pairwise, over all samples together; shapes must be equal."""
    pairs = [(_flat(want), _flat(got)) for want, got in zip(reference, ours, strict=True)]
    want = np.concatenate([pair[0] for pair in pairs])
    got = np.concatenate([pair[1] for pair in pairs])
    return TensorAgreement(
        max_error=float(np.abs(want - got).max()),
        std=float(want.std()),
        cosine=_cosine(want, got),
        sqnr_db=sqnr_db(want, got),
    )


def sqnr_db(want: NDArray[Any], got: NDArray[Any]) -> float:
    """Signal to quantization noise in dB: 10 log10(sum want^2 / sum (want - got)^2)."""
    want, got = _flat(want), _flat(got)
    signal, noise = float(want @ want), float((want - got) @ (want - got))
    if signal == 0.0 or noise <= signal * 10 ** (-MOST_DB / 10):
        return MOST_DB if noise == 0.0 or signal > 0.0 else -MOST_DB
    return 10 * math.log10(signal / noise)


def logits_agreement(
    reference: Sequence[NDArray[np.float32]], ours: Sequence[NDArray[np.float32]]
) -> LogitsAgreement:
    """Compare rows of logits [R, V] of several samples; R may differ from sample to sample."""
    want_RV = np.concatenate([np.asarray(rows, np.float64) for rows in reference])
    got_RV = np.concatenate([np.asarray(rows, np.float64) for rows in ours])
    differs = want_RV.argmax(axis=1) != got_RV.argmax(axis=1)
    ties = differs & (margins(want_RV) <= TIE_MARGIN)
    log_want, log_got = _log_softmax(want_RV), _log_softmax(got_RV)
    kl = (np.exp(log_want) * (log_want - log_got)).sum(axis=1).mean()
    return LogitsAgreement(
        max_error=float(np.abs(want_RV - got_RV).max()),
        std=float(want_RV.std()),
        cosine=_cosine(want_RV.ravel(), got_RV.ravel()),
        # Rounding may take it below zero; unlike `max`, this keeps a NaN.
        kl=float(np.maximum(kl, 0.0)),
        argmax=float(1.0 - differs.mean()),
        rows=len(differs),
        ties=int(ties.sum()),
        flips=int((differs & ~ties).sum()),
    )


def token_agreement(
    reference: Sequence[Sequence[int]],
    margins_of_reference: Sequence[NDArray[np.float64]],
    ours: Sequence[Sequence[int]],
) -> TokenAgreement:
    """Compare greedy answers; `margins_of_reference[i][t]` is the top-2 margin behind token t."""
    identical = ties = 0
    for want, margin_T, got in zip(reference, margins_of_reference, ours, strict=True):
        if list(want) == list(got):
            identical += 1
            continue
        parting = next(
            (t for t, (a, b) in enumerate(zip(want, got, strict=False)) if a != b),
            min(len(want), len(got)),
        )
        if parting < len(margin_T) and margin_T[parting] <= TIE_MARGIN:
            ties += 1
    return TokenAgreement(
        answers=len(reference),
        identical=identical,
        ties=ties,
        flips=len(reference) - identical - ties,
    )


def margins(logits_RV: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the distance of the two best logits of every row [R]."""
    best_two = np.partition(np.asarray(logits_RV, np.float64), -2, axis=1)[:, -2:]
    return np.asarray(best_two[:, 1] - best_two[:, 0])


def _flat(array: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(array, np.float64).ravel()


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))


def _log_softmax(logits_RV: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits_RV - logits_RV.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
