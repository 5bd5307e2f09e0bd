"""Fold the weights of norms into the linear maps that read them, and leave ones behind.

    linear(w * x + b) = (W diag(w)) x + (W b + c)

A quantized linear map then sees inputs of one scale, and later rotations may pass through the norm.
The outputs stay the same up to rounding in float32. A norm is skipped where something else reads
it: folding into a head that is the embedding would change the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from edgevlm.errors import PassError
from edgevlm.passes.base import Change, Context, Foresight, Pass

if TYPE_CHECKING:
    from torch import nn

    from edgevlm.model.norms import LayerNorm, RmsNorm
    from edgevlm.model.spec import VlmSpec
    from edgevlm.model.vlm import Vlm

FOLDED = "its weight is one and its bias zero already"


class FoldNorms(Pass):
    """Norm weights move into the columns of the linear maps that read them."""

    name: ClassVar[str] = "fold_norms"
    lossless: ClassVar[bool] = True

    def foresee(self, spec: VlmSpec, context: Context) -> Foresight:
        """Shapes and outputs stay as they are."""
        if spec.schemes:
            raise PassError(
                "the maps that read norms are quantized already",
                name=self.name,
                hint="put fold_norms before quantize",
            )
        return Foresight(spec=spec, effect="weights change, shapes and outputs do not")

    def apply(self, model: Vlm, context: Context) -> Change:
        """Fold every norm that linear maps alone read."""
        from edgevlm.model.norms import HeadNorm, LayerNorm, RmsNorm

        readers = dict(model.norm_consumers())
        norms = 0
        sites: list[str] = []
        skipped: dict[str, str] = {}
        for site, norm in model.named_modules():
            if isinstance(norm, HeadNorm):
                skipped[site] = "it scales each head alone, before rotation"
            elif isinstance(norm, (RmsNorm, LayerNorm)):
                reason = _why_not(model, norm, readers.get(site))
                if reason is None:
                    _fold(norm, _linears(model, readers[site]))
                    sites += (site, *readers[site])
                    norms += 1
                else:
                    skipped[site] = reason
        return Change(sites=tuple(sites), skipped=skipped, measures={"norms": norms})


def _why_not(model: Vlm, norm: RmsNorm | LayerNorm, readers: Sequence[str] | None) -> str | None:
    """Why a norm cannot be folded, or None where it can."""
    import torch

    if readers is None:
        return "something other than a linear map of its own reads it"
    bias = getattr(norm, "bias", None)
    shifts = bias is not None and bool(torch.any(bias != 0))
    if not shifts and bool(torch.all(norm.weight == 1)):
        return FOLDED
    for site, linear in zip(readers, _linears(model, readers), strict=True):
        if shifts and linear.bias is None:
            return f"its bias has no bias of {site} to go to"
    return None


def _fold(norm: RmsNorm | LayerNorm, linears: Sequence[nn.Linear]) -> None:
    """Move the norm's weight and bias into the linear maps, in place."""
    import torch

    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        for linear in linears:
            if bias is not None and linear.bias is not None:
                # W b adds many small numbers to c: in float64, rounded once.
                shift = linear.weight.double() @ bias.double()
                linear.bias.copy_(linear.bias.double() + shift)
            linear.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)
        if bias is not None:
            bias.zero_()


def _linears(model: Vlm, sites: Sequence[str]) -> list[nn.Linear]:
    from torch import nn

    linears = []
    for site in sites:
        module = model.get_submodule(site)
        assert isinstance(module, nn.Linear), site
        linears.append(module)
    return linears
