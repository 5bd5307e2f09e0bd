"""Where our model parts from the Hugging Face class: sites of both, paired by their weights.

A family's table of weight names says which of their modules a site of ours stands for (three of
them for a fused `qkv`), so the outputs of both can be compared in the order in which ours computes.
Norms before vision windows differ in the order of rows; such sites are compared as sets of rows
would be, sorted, which a real difference does not survive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgevlm.checkpoint import Checkpoint, load
from edgevlm.evidence.bisect import Divergence, first_divergence, site_errors, site_outputs
from edgevlm.evidence.eager import positions
from edgevlm.evidence.referee import Referee
from edgevlm.evidence.witness import Question
from edgevlm.families.weights import Weights
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vision import grid_tables
from edgevlm.model.vlm import Vlm


def find_origin(checkpoint: Checkpoint, spec: VlmSpec, question: Question) -> Divergence | None:
    """Return the first site of the model, before any pass, that differs from its counterpart."""
    model, referee = load(checkpoint, spec), Referee(checkpoint, spec)
    theirs = counterparts(model, referee.model, checkpoint.family.weights(spec))

    def measure(sites: Sequence[str]) -> dict[str, float]:
        ours = site_outputs(model, sites, lambda: _run(model, question))
        wanted = [name for site in sites for name in theirs[site]]
        seen = site_outputs(referee.model, wanted, lambda: referee.forward(question))
        reference = {
            site: _joined([seen[name] for name in theirs[site]], ours[site].size) for site in sites
        }
        return site_errors(
            {site: _sorted(rows) for site, rows in reference.items()},
            {site: _sorted(ours[site]) for site in sites},
        )

    return first_divergence(_order(model, list(theirs), question), measure)


def counterparts(model: Vlm, reference: nn.Module, weights: Weights) -> dict[str, list[str]]:
    """The modules of the reference that each site of ours stands for, by their weights."""
    modules = dict(reference.named_modules())
    found: dict[str, list[str]] = {}
    for name, source in weights.sources.items():
        site, _, leaf = name.rpartition(".")
        names = [weights.absolute(part.name).rpartition(".")[0] for part in source.parts]
        is_module = isinstance(model.get_submodule(site), nn.Module) and site != "embedding"
        if leaf == "weight" and is_module and all(name in modules for name in names):
            found[site] = names
    return found


def _order(model: Vlm, sites: list[str], question: Question) -> list[str]:
    """The sites in the order in which our model computes them."""
    seen = site_outputs(model, sites, lambda: _run(model, question))
    return list(seen)


def _run(model: Vlm, question: Question) -> torch.Tensor:
    """Our model from pixels to logits, each part fed by the one before."""
    encoded = []
    for image in question.images:
        grid = image.layout.grid or model.spec.vision.grids[0]
        for feed in image.feeds:
            pixels = torch.from_numpy(feed["pixels"])
            pixels = (
                pixels
                if grid_tables(model.spec.vision, grid) is None
                else pixels.view(1, *pixels.shape[-2:])
            )
            encoded.append(model.encode(pixels, grid).flatten(0, -2))
    image_rows = torch.cat(encoded) if encoded else None
    rows = model.embed(torch.from_numpy(question.prompt.token_ids), image_rows)
    logits: torch.Tensor = model(rows, positions(question, 0))
    return logits


def _joined(parts: Sequence[NDArray[np.float32]], size: int) -> NDArray[np.float32]:
    """The outputs of several modules side by side, as a fused one puts them out."""
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    joined = np.concatenate(rows, axis=-1)
    return joined if joined.size == size else joined[: size // joined.shape[-1]]


def _sorted(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values in ascending order: the same multiset, whatever the order of rows."""
    return np.sort(values.ravel())
