"""Where our model parts from the Hugging Face class: sites of both, paired by their weights.

A family's table of weight names says which of their modules a site of ours stands for (three of
them for a fused `qkv`), so the outputs of both can be compared in the order in which ours computes.

The values of a site are compared in ascending order, each side sorted by itself. The two sides lay
out the same values differently: convolutions put channels first, and Qwen2.5-VL keeps patches in
the order of its windows. A value that is right but in a wrong place therefore passes at its own
site, and shows at the next one that mixes rows or columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgevlm.checkpoint import Checkpoint, load
from edgevlm.evidence.bisect import (
    Divergence,
    computed_order,
    first_divergence,
    site_errors,
    site_outputs,
)
from edgevlm.evidence.fed import inputs_along, pixels_of, visual_of
from edgevlm.evidence.referee import Referee
from edgevlm.evidence.witness import Question
from edgevlm.families.weights import Weights
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm

UNLIKE = ("embedding", "vision.embed.position")
"""Sites whose outputs are none of theirs: each side looks up what it likes in the place of image
tokens, and our position table puts out the sum with the patches."""


def find_origin(checkpoint: Checkpoint, spec: VlmSpec, question: Question) -> Divergence | None:
    """Return the first site of the model, before any pass, that differs from its counterpart."""
    model, referee = load(checkpoint, spec), Referee(checkpoint, spec)
    theirs = counterparts(model, referee.model, checkpoint.family.weights(spec))

    def run() -> None:
        _run(model, question)

    def measure(sites: Sequence[str]) -> dict[str, float]:
        ours = site_outputs(model, sites, run)
        names = [name for site in sites for name in theirs[site]]
        seen = site_outputs(referee.model, names, lambda: referee.forward(question))
        return site_errors(
            {site: _sorted([seen[name] for name in theirs[site]]) for site in sites},
            {site: _sorted([ours[site]]) for site in sites},
        )

    return first_divergence(computed_order(model, list(theirs), run), measure)


def counterparts(model: Vlm, reference: nn.Module, weights: Weights) -> dict[str, list[str]]:
    """The modules of the reference that each site of ours stands for, by their weights."""
    modules = {name for name, _ in reference.named_modules()}
    found: dict[str, list[str]] = {}
    for name, source in weights.sources.items():
        site, _, leaf = name.rpartition(".")
        names = [weights.absolute(part.name).rpartition(".")[0] for part in source.parts]
        if leaf == "weight" and site not in UNLIKE and modules.issuperset(names):
            found[site] = names
    return found


def _run(model: Vlm, question: Question) -> None:
    """Run our model from pixels to logits, each part fed by the one before."""
    calls = []
    for image in question.images:
        grid = image.layout.grid or model.spec.vision.grids[0]
        calls += [(model.visual(pixels_of(feed), grid), grid) for feed in image.feeds]
    fed = inputs_along(model, question, visual_of(model, calls), ())
    model(fed.rows, fed.positions)


def _sorted(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """All values of a site in ascending order."""
    return np.sort(np.concatenate([part.ravel() for part in parts]))
