"""How large the things are that a piece looks at, so that it can say what its products cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgevlm.model.spec import AttentionSpec, VlmSpec
    from edgevlm.reduce.plan import Grid, Stage

__all__ = ["Extent", "Layer", "extent_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """An attention layer that a piece looks at: `rows` pass it, of `width` numbers."""

    attention: AttentionSpec
    rows: int
    width: int

    def probe_macs(self, asking: int, *, num_heads: int | None = None) -> int:
        """Multiply-adds of so many probe rows: their products with all keys, and the sum of them.

        `num_heads` are those of the softmax, where queries and keys are not taken head by head.
        """
        heads = self.attention.num_heads if num_heads is None else num_heads
        return asking * self.rows * (self.attention.q_width + heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """What a stage sees: of one picture group before the decoder, of a whole prompt within it.

    Of `tokens` a group `kept` leave, `extra` of them made of the rest; a token has `width` numbers.
    `layers` are those it looks at, keyed as in a `View`; `class_row` says that they have a class
    token. `question` are the text rows of the prompt, `call` all rows that a stage within the
    decoder sees, none before it. `encoded` is the width of the encoder's features, `encoder_width`
    that of the rows of its `depth` layers. `grid_in` and `grid_out` are the grids of a transform.
    `dense` asks for forms without TopK and Gather, whose look-ups are products.
    """

    tokens: int
    kept: int
    width: int
    extra: int = 0
    groups: int = 1
    layers: Mapping[int | str, Layer] = field(default_factory=dict)
    class_row: bool = False
    question: int = 0
    call: int = 0
    depth: int = 0
    encoder_width: int = 0
    encoded: int = 0
    grid_in: Grid | None = None
    grid_out: Grid | None = None
    dense: bool = False

    @property
    def text_rows(self) -> int:
        """Rows among which text is looked for."""
        return self.call or self.question

    def taken_macs(self, count: int, rows: int, width: int) -> int:
        """Multiply-adds of taking `count` of so many rows: none, unless by a one-hot product."""
        return count * rows * width if self.dense else 0

    def chosen_macs(self, rows: int, *counts: int) -> int:
        """Multiply-adds of finding the best of so many rows, and perhaps the others too.

        Without sorting, ranks are a product, and so are the numbers of each part, whose sizes are
        the `counts`.
        """
        if not self.dense:
            return 0
        return rows * rows + sum(rows * rows + count * rows for count in counts)


def extent_of(spec: VlmSpec, stage: Stage) -> Extent:
    """What a stage of a model sees, of whatever prompt."""
    vision, reduction = spec.vision, spec.reduction
    widths = {"input": vision.width, "encoder.layers": vision.width, "encoder": vision.out_width}
    return Extent(
        tokens=stage.count_in,
        kept=stage.count_out,
        width=widths.get(stage.at, spec.decoder.width),
        extra=stage.extra,
        class_row=vision.class_token,
        encoded=vision.out_width,
        depth=len(vision.layers),
        encoder_width=vision.width,
        grid_in=stage.grid_in,
        grid_out=stage.grid_out,
        dense=reduction is not None and reduction.dense,
    )
