"""Chooses between one thread and all of them while training on a shared machine.

When other programs hold a core, every parallel loop waits for its slower half, and one thread is
faster than two. So both are timed now and then, and the faster one is kept.
"""

from __future__ import annotations

import os
import time

import torch

_PROBE_STEPS = 3
_KEEP_S = 200.0


class ThreadChooser:
    """Call `step` after every training step; it sets the number of threads."""

    def __init__(self, num_threads: int | None) -> None:
        """Keep a given number of threads, or start on one and probe."""
        all_threads = os.cpu_count() or 1
        self._choices = sorted({1, all_threads}) if num_threads is None else [num_threads]
        self._chosen = 0
        self._step_s = [float("inf")] * len(self._choices)
        self._last = time.monotonic()
        self._probe_at = self._last
        self._probe: list[tuple[int, list[float]]] = []
        torch.set_num_threads(self._choices[self._chosen])

    @property
    def num_threads(self) -> int:
        """The number of threads chosen last."""
        return self._choices[self._chosen]

    def step(self) -> None:
        """Note a step's time; probe every minute, and keep the faster choice."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        if len(self._choices) == 1:
            return
        if self._probe:
            index, times = self._probe[0]
            times.append(elapsed)
            if len(times) < _PROBE_STEPS:
                return
            # The first step after a change prepares kernels; the lower median ignores it.
            self._step_s[index] = sorted(times)[len(times) // 2 - 1]
            del self._probe[0]
            if not self._probe:
                self._chosen = min(range(len(self._choices)), key=self._step_s.__getitem__)
                self._probe_at = now + _KEEP_S
        elif now >= self._probe_at:
            self._probe = [(index, []) for index in range(len(self._choices))]
        index = self._probe[0][0] if self._probe else self._chosen
        torch.set_num_threads(self._choices[index])
