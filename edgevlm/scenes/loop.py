"""The training loop of both stages: schedule by time spent, checkpoints, a log with an ETA.

The learning rate follows the share of the time budget that has been spent *training*, not the
number of steps: on a shared machine a run then still ends with its decay done.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from edgevlm.scenes.muon import Muon
from edgevlm.scenes.threads import ThreadChooser

_LOG = logging.getLogger(__name__)

Tallies = dict[str, tuple[float, float]]


class Stage(Protocol):
    """What a stage of training gives to the loop."""

    module: nn.Module

    def batches(self) -> Dataset[dict[str, torch.Tensor]]:
        """Batches by step number, each a pure function of that number."""

    def loss(self, batch: dict[str, torch.Tensor], step: int) -> tuple[torch.Tensor, Tallies]:
        """The loss of a batch, and named (sum, count) pairs for the log."""

    def export(self, folder: Path) -> None:
        """Write what the next stage, or a user, needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long to train, how fast, and where to keep the state."""

    folder: Path
    hours: float
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    vision_share: float = 1.0
    warm_up: float = 0.02
    floor: float = 0.02
    num_threads: int | None = None
    save_minutes: float = 4.0
    log_minutes: float = 1.0


def run_stage(stage: Stage, budget: Budget, *, resume: bool) -> None:
    """Train a stage until its hours are spent; with `resume`, go on from its last state."""
    budget.folder.mkdir(parents=True, exist_ok=True)
    state_path = budget.folder / "state.pt"
    optimizers = _optimizers(stage.module, budget)
    step, spent = 0, 0.0
    if resume and state_path.exists():
        state = torch.load(state_path, map_location=_host(stage.module), weights_only=True)
        stage.module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent_s"]
        _LOG.info("resumed at step %d after %.0f s", step, spent)
    seconds = budget.hours * 3600
    log = _Log(seconds)
    threads = ThreadChooser(budget.num_threads)
    saved_at = spent
    stage.module.train()
    batches = _load(stage, first=step)
    started = time.monotonic()
    while spent < seconds:
        rate = _rate(spent / seconds, budget)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
        loss, tallies = stage.loss(next(batches), step)
        loss.backward()
        nn.utils.clip_grad_norm_(stage.module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        threads.step()
        step += 1
        now = time.monotonic()
        spent, started = spent + now - started, now
        log.add(float(loss.detach()), tallies)
        if log.age_s() > 60 * budget.log_minutes:
            log.write(step, spent, rate, threads.num_threads)
        if spent - saved_at > 60 * budget.save_minutes or spent >= seconds:
            saved_at = spent
            _save(state_path, stage.module, optimizers, step, spent)
            stage.export(budget.folder)
            started = time.monotonic()
    log.write(step, spent, 0.0, threads.num_threads)


def tally(hits: torch.Tensor) -> tuple[float, float]:
    """A (sum, count) pair of a tensor of zeros and ones."""
    return float(hits.sum()), float(hits.numel())


class _Log:
    """Averages since the last line."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._reset()

    def add(self, loss: float, tallies: Tallies) -> None:
        self._losses.append(loss)
        for name, (total, count) in tallies.items():
            had = self._tallies.get(name, (0.0, 0.0))
            self._tallies[name] = (had[0] + total, had[1] + count)

    def age_s(self) -> float:
        return time.monotonic() - self._since

    def write(self, step: int, spent: float, rate: float, num_threads: int) -> None:
        tallies = dict(self._tallies)
        pictures = tallies.pop("pictures", (0.0, 0.0))[0]
        shown = " ".join(
            f"{name} {100 * total / count:.1f}" for name, (total, count) in tallies.items() if count
        )
        _LOG.info(
            "step %d  %.1f min, %.1f left  rate %.2f  %.1f pictures/s on %d threads  loss %.4f  %s",
            step,
            spent / 60,
            max(0.0, self._seconds - spent) / 60,
            rate,
            pictures / max(self.age_s(), 1e-9),
            num_threads,
            sum(self._losses) / max(len(self._losses), 1),
            shown,
        )
        self._reset()

    def _reset(self) -> None:
        self._losses: list[float] = []
        self._tallies: Tallies = {}
        self._since = time.monotonic()


def _rate(share: float, budget: Budget) -> float:
    """Linear warm-up, then a cosine down to the floor, as a factor of the peak rate."""
    if share < budget.warm_up:
        return max(share / budget.warm_up, 0.01)
    decay = (share - budget.warm_up) / (1 - budget.warm_up)
    return budget.floor + (1 - budget.floor) * 0.5 * (1 + math.cos(math.pi * min(decay, 1.0)))


def _optimizers(module: nn.Module, budget: Budget) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms, biases and heads."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (matrix, vision): [] for matrix in (True, False) for vision in (True, False)
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = ".layers." in name or "multi_modal_projector" in name
        groups[inner and parameter.ndim == 2, "vision" in name].append(parameter)

    def with_peaks(matrix: bool, rate: float) -> list[dict[str, Any]]:
        return [
            {"params": groups[matrix, vision], "peak": rate * share}
            for vision, share in ((True, budget.vision_share), (False, 1.0))
            if groups[matrix, vision]
        ]

    muon = Muon(with_peaks(True, budget.muon_rate))
    adam = torch.optim.AdamW(
        with_peaks(False, budget.adam_rate), betas=(0.9, 0.98), weight_decay=0.0
    )
    return [muon, adam]


def _load(stage: Stage, *, first: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches from `first` on, made by one worker while this process trains."""
    loader: DataLoader[Any] = DataLoader(
        stage.batches(),
        batch_size=None,
        sampler=range(first, 1_000_000_000),
        num_workers=1,
        prefetch_factor=6,
    )
    host = _host(stage.module)
    for batch in loader:
        yield {name: tensor.to(host) for name, tensor in batch.items()}


def _host(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _save(
    path: Path,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    spent: float,
) -> None:
    """Write the state beside the old one, then replace it in one step."""
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "module": module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "spent_s": spent,
        },
        partial,
    )
    os.replace(partial, path)
