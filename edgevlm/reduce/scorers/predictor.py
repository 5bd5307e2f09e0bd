"""A small learned network that says which tokens matter (Dynamic-LLaVA; CoViPAL with the question).

Dynamic-LLaVA (arXiv 2412.00876): rows are normed and made narrow, pass two blocks of a transformer,
and half of what comes out is replaced by its mean over the tokens; an MLP makes two numbers of
each row, of which the first says keep and the second drop. CoViPAL (arXiv 2508.17243) trains a
module of its own from attention in deep layers; its layout is not published, and here it is the
same network with one attention to the question behind the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from edgevlm.document import Complaint
from edgevlm.reduce.learned import (
    Weight,
    activated,
    attended,
    attention_macs,
    attention_weights,
    learned,
    linear,
    linear_weights,
    norm_weights,
    normed,
    numpy_attended,
    numpy_gelu,
    numpy_learned,
    numpy_linear,
    numpy_normed,
)
from edgevlm.reduce.piece import Scorer, Site, StaticClass, register

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


@register
class Predictor(Scorer):
    """The first of two learned numbers over the second, as logarithms of chances."""

    name: ClassVar[str] = "predictor"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector", "decoder")
    is_learned: ClassVar[bool] = True

    width: int = Field(512, ge=8, multiple_of=8, description="Width of its rows.")
    heads: int = Field(8, ge=1)
    blocks: int = Field(2, ge=0, description="Blocks of its transformer.")
    query: Literal["none", "text", "question", "words"] = Field(
        "none", description="Rows of text that its tokens attend to; none: no text."
    )

    @model_validator(mode="after")
    def _splits_evenly(self) -> Predictor:
        if self.width % self.heads:
            raise Complaint(
                f"{self.heads} heads do not share {self.width} numbers evenly",
                hint="choose a number of heads that divides width",
                key="heads",
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Rows of text, where it looks at them."""
        return frozenset() if self.query == "none" else frozenset({"question"})

    @property
    def asks(self) -> frozenset[str]:
        """Weights of rows of text, where it looks at them."""
        return frozenset() if self.query == "none" else frozenset({self.query})

    def weights(self, extent: Extent) -> Mapping[str, Weight]:
        """Of the network for tokens of some width; rows of text are as wide."""
        ours, width = self.width, extent.width
        found = {**norm_weights("norm", width), **linear_weights("embed", width, ours)}
        for block in range(self.blocks):
            found |= norm_weights(f"b{block}_norm1", ours)
            found |= attention_weights(f"b{block}", ours)
            found |= norm_weights(f"b{block}_norm2", ours)
            found |= linear_weights(f"b{block}_up", ours, 4 * ours)
            found |= linear_weights(f"b{block}_down", 4 * ours, ours)
        if self.query != "none":
            found |= norm_weights("text_norm", width)
            found |= norm_weights("asking_norm", ours)
            found |= attention_weights("text", ours, width)
        for name, rows, columns in self._tail:
            found |= linear_weights(name, rows, columns)
        return found

    @property
    def _tail(self) -> tuple[tuple[str, int, int], ...]:
        """The last maps: half as wide, a quarter, and two numbers."""
        half, quarter = self.width // 2, self.width // 4
        return ("narrow", self.width, half), ("narrower", half, quarter), ("two", quarter, 2)

    def macs(self, extent: Extent) -> int:
        """Every linear map and attention, for each group."""
        rows, ours = extent.tokens, self.width
        total = rows * extent.width * ours
        total += self.blocks * (attention_macs(rows, rows, ours) + 8 * rows * ours * ours)
        if self.query != "none":
            text = extent.text_rows
            total += attention_macs(rows, text, ours, extent.width)
        total += sum(rows * before * behind for _, before, behind in self._tail)
        return total * extent.groups

    def torch(self, view: View[Tensor]) -> Tensor:
        """All groups at once."""
        import torch

        weights, x = learned(view, self.name), view.tokens.features
        x = activated(linear(weights, "embed", normed(weights, "norm", x)))
        for block in range(self.blocks):
            name = f"b{block}"
            inner = normed(weights, f"{name}_norm1", x)
            x = x + attended(weights, name, inner, inner, self.heads)
            up = linear(weights, f"{name}_up", normed(weights, f"{name}_norm2", x))
            x = x + linear(weights, f"{name}_down", activated(up))
        if self.query != "none":
            rows, weight = view.text(self.query)
            rows = normed(weights, "text_norm", rows).expand(x.shape[0], -1, -1)
            asking = normed(weights, "asking_norm", x)
            weight = weight.expand(x.shape[0], -1)
            x = x + attended(weights, "text", asking, rows, self.heads, weight=weight)
        own = x[..., : self.width // 2]
        mean = x[..., self.width // 2 :].mean(1, keepdim=True).expand_as(own)
        x = torch.cat([own, mean], -1)
        x = activated(linear(weights, "narrow", x))
        x = linear(weights, "two", activated(linear(weights, "narrower", x)))
        return x[..., 0] - x[..., 1]

    def numpy(self, view: View[np.ndarray]) -> np.ndarray:
        """In float64."""
        weights, x = numpy_learned(view, self.name), view.tokens.features.astype(np.float64)
        x = numpy_gelu(numpy_linear(weights, "embed", numpy_normed(weights, "norm", x)))
        for block in range(self.blocks):
            name = f"b{block}"
            inner = numpy_normed(weights, f"{name}_norm1", x)
            x = x + numpy_attended(weights, name, inner, inner, self.heads)
            up = numpy_linear(weights, f"{name}_up", numpy_normed(weights, f"{name}_norm2", x))
            x = x + numpy_linear(weights, f"{name}_down", numpy_gelu(up))
        if self.query != "none":
            rows, weight = view.text(self.query)
            keys = np.repeat(numpy_normed(weights, "text_norm", rows), len(x), 0)
            asking = numpy_normed(weights, "asking_norm", x)
            weight = np.repeat(weight, len(x), 0)
            x = x + numpy_attended(weights, "text", asking, keys, self.heads, weight=weight)
        middle = self.width // 2
        x[..., middle:] = x[..., middle:].mean(1, keepdims=True)
        x = numpy_gelu(numpy_linear(weights, "narrow", x))
        x = numpy_linear(weights, "two", numpy_gelu(numpy_linear(weights, "narrower", x)))
        found: np.ndarray = x[..., 0] - x[..., 1]
        return found
