"""Passes as stages of a compile: each kept under a key that chains all that came before it.

What a pass reported is always kept. The weights it changed are kept where it took long to change
them; where it did not, running it again costs less than reading them back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgevlm.cache import StageCache, digest, file_digest
from edgevlm.model.vlm import Vlm, place
from edgevlm.passes.base import Applied, Change, Context, Pass, run_pass

WORTH_KEEPING_S = 10.0
KEPT = "weights-*.safetensors"
# A file is put together in memory before it is written.
FILE_BYTES = 128 * 2**20


def chain(model_key: str, steps: Sequence[Pass], context: Context) -> str:
    """The key of a model after these passes."""
    key = model_key
    for step in steps:
        key = step_key(key, step, context)
    return key


def step_key(key: str, step: Pass, context: Context) -> str:
    """The key of a model after one more pass: its options, and what it looks at besides."""
    seen: tuple[object, ...] = (context.device.name, context.device.dtypes, context.targets)
    seen = (*seen, context.device.numeric, context.samples_key) if step.calibrates else ()
    files = [file_digest(context.folder / name) for name in step.files]
    return digest(key, step.name, step, context.seed, *seen, *files)


def run_stages(
    steps: Sequence[Pass], model: Vlm, context: Context, cache: StageCache, model_key: str
) -> tuple[Vlm, tuple[Applied, ...]]:
    """Run the passes in the recipe's order, or put in place what an earlier run of them kept."""
    applied = []
    key = model_key
    for step in steps:
        key = step_key(key, step, context)
        with cache.workplace("passes", key) as work:
            here = replace(context, work=work)
            model, change = _stage(step, model, here, cache, key)
        applied.append(Applied(step=step, change=change))
    return model, tuple(applied)


def _stage(
    step: Pass, model: Vlm, context: Context, cache: StageCache, key: str
) -> tuple[Vlm, Change]:
    kept = cache.find("passes", key)
    if kept is not None and any(kept.glob(KEPT)):
        change = _change(kept)
        return _restore(step, model, kept, change, context), change
    before = {name: (weight.data_ptr(), weight._version) for name, weight in _weights(model)}
    started = time.monotonic()
    change = run_pass(step, model, context)
    took = time.monotonic() - started

    def keep(folder: Path) -> None:
        (folder / "change.json").write_text(json.dumps(asdict(change)))
        if took > WORTH_KEEPING_S:
            changed = {
                name: weight
                for name, weight in _weights(model)
                if before.get(name) != (weight.data_ptr(), weight._version)
            }
            _save(changed, folder)

    cache.build("passes", key, keep)
    return model, change


def _save(weights: Mapping[str, torch.nn.Parameter], folder: Path) -> None:
    """Write weights in files of some size each, so that no second copy of all is held."""
    number, size, part = 0, 0, dict[str, torch.Tensor]()
    for count, (name, weight) in enumerate(weights.items(), 1):
        part[name] = weight.detach().contiguous()
        size += weight.nbytes
        if size >= FILE_BYTES or count == len(weights):
            save_file(part, folder / KEPT.replace("*", f"{number:05d}"))
            number, size, part = number + 1, 0, {}


def _restore(step: Pass, model: Vlm, kept: Path, change: Change, context: Context) -> Vlm:
    """Put kept weights into the model, in the shape that the pass gives it."""
    spec = step.reshape(model.spec, change, context)
    if spec != model.spec:
        with torch.device("meta"):
            reshaped = Vlm(spec)
        old = dict(_weights(model))
        for name, _ in list(reshaped.named_parameters()):
            if name in old:
                place(reshaped, name, old[name])
        model = reshaped.eval()
    for path in sorted(kept.glob(KEPT)):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                # Copied, so that it is aligned: sums of other kernels differ in their last bits.
                place(model, name, weights.get_tensor(name).clone())
    model.tie()
    return model


def _change(kept: Path) -> Change:
    data = json.loads((kept / "change.json").read_text())
    return Change(**{**data, "sites": tuple(data["sites"])})


def _weights(model: Vlm) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())
