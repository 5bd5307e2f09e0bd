"""Passes as stages of a compile: each kept under a key that chains all that came before it.

What a pass reported is always kept. The weights it changed are kept where it took long to change
them; where it did not, running it again costs less than reading them back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from edgevlm.cache import StageCache, digest
from edgevlm.model.vlm import Vlm, place
from edgevlm.passes.base import Applied, Change, Context, Pass, run_pass

WORTH_KEEPING_S = 10.0


def chain(model_key: str, steps: Sequence[Pass]) -> str:
    """The key of a model after these passes."""
    key = model_key
    for step in steps:
        key = digest(key, step.name, step)
    return key


def run_stages(
    steps: Sequence[Pass], model: Vlm, context: Context, cache: StageCache, model_key: str
) -> tuple[Vlm, tuple[Applied, ...]]:
    """Run the passes in the recipe's order, or put in place what an earlier run of them kept."""
    applied = []
    key = model_key
    for step in steps:
        key = chain(key, [step])
        model, change = _stage(step, model, context, cache, key)
        applied.append(Applied(step=step, change=change))
    return model, tuple(applied)


def _stage(
    step: Pass, model: Vlm, context: Context, cache: StageCache, key: str
) -> tuple[Vlm, Change]:
    kept = cache.find("passes", key)
    if kept is not None and (kept / "weights.safetensors").exists():
        return _restore(step, model, kept), _change(kept)
    before = {name: (weight.data_ptr(), weight._version) for name, weight in _weights(model)}
    started = time.monotonic()
    change = run_pass(step, model, context)
    took = time.monotonic() - started

    def keep(folder: Path) -> None:
        (folder / "change.json").write_text(json.dumps(asdict(change)))
        if took > WORTH_KEEPING_S:
            changed = {
                name: weight.detach().contiguous()
                for name, weight in _weights(model)
                if before.get(name) != (weight.data_ptr(), weight._version)
            }
            save_file(changed, folder / "weights.safetensors")

    cache.build("passes", key, keep)
    return model, change


def _restore(step: Pass, model: Vlm, kept: Path) -> Vlm:
    """Put kept weights into the model, in the shape that the pass gives it."""
    spec = step.foresee(model.spec).spec
    if spec != model.spec:
        with torch.device("meta"):
            reshaped = Vlm(spec)
        old = dict(_weights(model))
        for name, _ in list(reshaped.named_parameters()):
            if name in old:
                place(reshaped, name, old[name])
        model = reshaped.eval()
    for name, weight in load_file(kept / "weights.safetensors").items():
        place(model, name, weight)
    model.tie()
    return model


def _change(kept: Path) -> Change:
    data = json.loads((kept / "change.json").read_text())
    return Change(sites=tuple(data["sites"]), skipped=data["skipped"], measures=data["measures"])


def _weights(model: Vlm) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())
