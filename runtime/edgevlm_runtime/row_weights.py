"""Which rows of a prompt ask: a weight for every row, 0 for those of the pictures, by kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# T rows of the prompt, V of them visual


def row_weights(
    token_ids: NDArray[np.int64], image_rows: NDArray[np.int64], silent_tokens: Sequence[int]
) -> dict[str, NDArray[np.float32]]:
    """Weights [T] of each kind that `edgevlm_runtime.manifest` names, for visual rows [V]."""
    text = np.ones(len(token_ids), np.float32)
    text[image_rows] = 0
    question = text.copy()
    question[: image_rows.max(initial=0)] = 0
    words = np.where(np.isin(token_ids, silent_tokens), np.float32(0), question)
    return {"text": text, "question": question, "words": words if words.any() else question}
