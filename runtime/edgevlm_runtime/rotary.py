"""Rotary tables: cosines and sines of the rows of one call, for any positions.

Where positions are whole numbers and one per row (the ordinary case), rows are copied from a table
made once. Fractions, positions of different numbers (M-RoPE, PPE) and those past the table are
computed.
"""

from __future__ import annotations

import numpy as np

from edgevlm_runtime.engine import Array
from edgevlm_runtime.manifest import RopeSpec

# T rows, F frequencies


class RotaryTable:
    """Cosines and sines [T, F]; angles are products in float32, as in the checkpoints' own code."""

    def __init__(self, spec: RopeSpec, num_positions: int) -> None:
        """Tabulate whole positions from 0."""
        self._inv_freq = np.array(spec.inv_freq, np.float32)
        self._scaling = np.float32(spec.attention_scaling)
        self._sections = np.repeat(np.arange(len(spec.sections)), spec.sections)
        self.num_axes = spec.num_axes
        whole = np.arange(num_positions, dtype=np.float32)
        self._cos, self._sin = self._rows(np.tile(whole[:, None], self.num_axes))

    def fill(self, positions: Array, cos: Array, sin: Array) -> None:
        """Write rows 0 to T - 1 of `cos` and `sin` for positions float64 [T, axes]."""
        num_rows = len(positions)
        if num_rows == 1:
            axes = positions[0].tolist()
            first = axes[0]
            whole = 0 <= first < len(self._cos) and first.is_integer()
            if whole and axes.count(first) == len(axes):
                cos[0], sin[0] = self._cos[int(first)], self._sin[int(first)]
                return
        cos[:num_rows], sin[:num_rows] = self._rows(positions)

    def _rows(self, positions: Array) -> tuple[Array, Array]:
        """Compute [T, F] from positions [T, axes]; frequency f turns with axis sections[f]."""
        turning = positions[:, self._sections] if len(self._sections) else positions
        angles = turning.astype(np.float32) * self._inv_freq
        return np.cos(angles) * self._scaling, np.sin(angles) * self._scaling
