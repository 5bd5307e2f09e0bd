"""The vision-language model: vision, projector, embedding and decoder, built from a spec."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from edgevlm.model.attention import Angles, DeltaCache, FullCache
from edgevlm.model.bottleneck import Hidden, hidden_of
from edgevlm.model.decoder import Decoder
from edgevlm.model.fusion import Fusion
from edgevlm.model.layers import GatedMlp, Layer
from edgevlm.model.projector import build_projector
from edgevlm.model.quantized import QuantEmbedding, QuantLinear
from edgevlm.model.remember import remember_modules
from edgevlm.model.rope import rope_tables
from edgevlm.model.skips import skip_modules
from edgevlm.model.spec import AttentionSpec, VlmSpec
from edgevlm.model.stages import (
    Asking,
    CutModule,
    Grid,
    Pictures,
    Seen,
    cut_modules,
    project,
    stage_modules,
)
from edgevlm.model.vision import Vision, grid_tables
from edgevlm.reduce.seq import VisSeq
from edgevlm_export.ops import causal_mask

Observe = Callable[[Tensor, Tensor], None]
"""Is shown what a cache would hold."""


class Vlm(nn.Module):
    """The whole model; `vision`, `projector`, `embedding` and `decoder` are the roots of sites."""

    def __init__(self, spec: VlmSpec) -> None:
        """Build the module, on whatever device is the default; a tied head is the embedding."""
        super().__init__()
        self.spec = spec
        self.vision = Vision(spec.vision)
        self.projector = build_projector(spec.projector)
        self.embedding: nn.Module = nn.Embedding(spec.decoder.vocab_size, spec.decoder.width)
        self.decoder = Decoder(spec.decoder)
        self.prefill = Decoder(spec.decoder) if spec.has_prefill else None
        self.reduce = nn.ModuleList()
        self.fusion: Fusion | None = None
        self.stage(spec)
        for site, scheme in spec.schemes.items():
            linear = self.get_submodule(site)
            assert isinstance(linear, nn.Linear), site
            rows, columns = linear.weight.shape
            quantized = QuantLinear(rows, columns, linear.bias is not None, scheme)
            self.set_submodule(site, quantized)
        if spec.table is not None:
            decoder = spec.decoder
            self.embedding = QuantEmbedding(decoder.vocab_size, decoder.width, spec.table)
        self.tie()

    def tie(self) -> None:
        """Let modules share what is one: a tied head, and what both decoders have alike."""
        if self.spec.head_is_table:
            for name in ("weight", "scale") if self.spec.table is not None else ("weight",):
                setattr(self.decoder.head, name, self.embedding.get_parameter(name))
        if self.prefill is None:
            return
        self.prefill.head = self.decoder.head
        for name, module in list(self.prefill.named_modules()):
            twin = self.decoder.get_submodule(name)
            if not isinstance(module, QuantLinear) and not isinstance(twin, QuantLinear):
                for attribute, weight in twin.named_parameters(recurse=False):
                    setattr(module, attribute, weight)

    def stage(self, spec: VlmSpec) -> None:
        """Take the reduction of a spec: its stages, at their sites."""
        self.spec = spec
        self.vision.stage(spec)
        self.reduce = stage_modules(spec, "projector")
        options = None if spec.reduction is None else spec.reduction.fusion
        self.fusion = None if options is None else Fusion(spec, options)
        for decoder in (self.decoder, self.prefill):
            if decoder is not None:
                decoder.cuts = cut_modules(spec)
                decoder.skips = skip_modules(spec)
                decoder.remembers = remember_modules(spec)

    def split_phases(self) -> None:
        """Give prompts a decoder of their own, which shares every weight until one is replaced."""
        shared = {id(weight): weight for weight in self.decoder.parameters()}
        self.prefill = copy.deepcopy(self.decoder, shared)
        self.prefill.head = self.decoder.head

    def encode(
        self, pixels: Tensor, grid: Grid | None = None, question: Asking | None = None
    ) -> Tensor:
        """Map pixels [N, ...] of pictures (or tiles) of one grid to image rows [N, tokens, W]."""
        return self.visual(pixels, grid, question).features

    def visual(
        self, pixels: Tensor, grid: Grid | None = None, question: Asking | None = None
    ) -> VisSeq[Tensor]:
        """The visual tokens of pictures of one grid, as rows of the decoder."""
        grid = self.spec.vision.grids[0] if grid is None else grid
        seen = self.vision(pixels, grid_tables(self.spec.vision, grid), grid)
        return self.project(seen, grid, question)

    def project(
        self, seen: Seen, grid: tuple[int, int], question: Asking | None = None
    ) -> VisSeq[Tensor]:
        """Features [N, rows, out_width] of pictures to rows of the decoder [N, tokens, W]."""
        return project(self.spec, self.projector, self.reduce, seen, grid, question, self.fusion)

    def embed(self, token_ids: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """Rows [1, T, W] of a prompt [T]: image rows [M, W] stand where the image token is."""
        rows: Tensor = self.embedding(token_ids)
        if image_rows is not None:
            rows = rows.clone()
            rows[token_ids == self.spec.image_token_id] = image_rows
        return rows[None]

    def forward(
        self,
        rows: Tensor,
        positions: Tensor,
        logit_rows: Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> Tensor:
        """Logits of a whole sequence of rows [1, T, W] at positions [T] or [A, T], as a prompt."""
        return self.whole(self.prefill or self.decoder, rows, positions, logit_rows, pictures)

    def whole(
        self,
        decoder: Decoder,
        rows: Tensor,
        positions: Tensor,
        logit_rows: Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> Tensor:
        """The same by one of the decoders."""
        keys = self.whole_keys(positions, hidden=self.hidden(rows, pictures))
        logits: Tensor = decoder(rows, keys, logit_rows, pictures)
        return logits

    def hidden(self, rows: Tensor, pictures: Pictures | None) -> Hidden | None:
        """What a bottleneck hides in a call of rows [1, T, W]; None where there is none."""
        if pictures is None or not self.spec.hidden:
            return None
        return hidden_of(self.spec, pictures.starts, rows)

    def whole_keys(
        self,
        positions: Tensor,
        observe: Sequence[Observe] | None = None,
        hidden: Hidden | None = None,
    ) -> list[FullCache]:
        """The sources of a whole sequence, each shown to its observer of what a cache holds.

        `hidden` is what a bottleneck hides among its rows.
        """
        cos, sin = rope_tables(self.spec.decoder.rope, positions)
        keys: list[FullCache] = []
        for segment in self.spec.segments:
            # Positions that count on by one are packed by leaving out the last of them.
            angles = Angles(cos, sin, is_own=segment.is_packed or segment.first == 0)
            for layer in range(segment.first, segment.end):
                keys.append(FullCache(angles, None if observe is None else observe[layer], hidden))
        return keys

    def answer(
        self, rows: Tensor, positions: Tensor, num_prompt: int, pictures: Pictures | None = None
    ) -> Tensor:
        """Logits [T - P + 1, V] of the last of P prompt rows, and of the rows [1, T, W] after it.

        A decoder of its own reads the prompt where there is one, and the answer's rows follow in
        one call: none of them may see what rounds another.
        """
        wanted = torch.arange(num_prompt - 1, rows.shape[1])
        if self.prefill is None:
            return self.whole(self.decoder, rows, positions, wanted, pictures)[0]
        past = self._nothing()
        begin, logits = 0, []
        for decoder, end in ((self.prefill, num_prompt), (self.decoder, rows.shape[1])):
            if end > begin:
                part = rows[:, begin:end], positions[..., begin:end]
                wanted = torch.arange(end - begin)[-1 if begin == 0 else 0 :]
                shown = pictures if begin == 0 else None
                out, past = self._extend(decoder, *part, past, wanted, begin, shown)
                logits.append(out[0])
            begin = end
        return torch.cat(logits)

    def _nothing(self) -> list[tuple[Tensor, Tensor]]:
        """A cache of no rows."""
        return [_no_rows(layer.attention) for layer in self.spec.decoder.layers]

    def _extend(
        self,
        decoder: Decoder,
        rows: Tensor,
        positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
        logit_rows: Tensor,
        length: int,
        pictures: Pictures | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [1, R, V] of more rows [1, T, W] after `length` of them, and the longer cache."""
        new, keys = rows.shape[1], list[DeltaCache]()
        num_groups = 0 if pictures is None else len(pictures.starts)
        tokens, hidden = self.spec.entering, self.hidden(rows, pictures)
        for segment in self.spec.segments:
            used = past[segment.first][0].shape[2]
            gone = length - used if segment.is_packed else 0
            cos, sin = rope_tables(self.spec.decoder.rope, positions - gone)
            is_own = segment.is_packed or segment.first == 0 or pictures is None
            angles = Angles(cos, sin, is_own=is_own)
            here = new - num_groups * (tokens - segment.tokens)
            for index in range(segment.first, segment.end):
                window = self.spec.decoder.layers[index].attention.window or 0
                if hidden is None:
                    mask = causal_mask(here, used + here, window)[None, None]
                else:
                    mask = hidden.mask(torch.zeros(1, 1, 1, used))
                keys.append(DeltaCache(*past[index], mask, angles, hidden))
        logits = decoder(rows, keys, logit_rows, pictures)
        longer = [
            (torch.cat([old_key, source.key], 2), torch.cat([old_value, source.value], 2))
            for (old_key, old_value), source in zip(past, keys, strict=True)
        ]
        return logits, longer

    @torch.no_grad()
    def greedy(
        self, rows: Tensor, positions: Tensor, pictures: Pictures | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Continue a prompt of rows [1, T, W]: an endless stream of (token, its logits [V]).

        Positions are [T] or [A, T]; a new token stands one after the largest of them.
        """
        past, length = self._nothing(), 0
        next_position = positions.max().floor() + 1
        decoder = self.prefill or self.decoder
        while True:
            last = torch.tensor([rows.shape[1] - 1])
            out, past = self._extend(decoder, rows, positions, past, last, length, pictures)
            logits, decoder, pictures = out[0, 0], self.decoder, None
            length += rows.shape[1]
            token = int(logits.argmax())
            yield token, logits
            rows = self.embedding(torch.tensor([[token]]))
            positions = next_position.expand(*positions.shape[:-1], 1)
            next_position = next_position + 1

    def norm_consumers(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each norm whose output only linear maps read, with those maps: (site, sites).

        Left out are norms that something else reads too: a norm before a vision feature, one whose
        rows are gathered into squares, and the decoder's last where its head is the embedding, or
        where a stage looks at what it gives.
        """
        found: list[tuple[str, tuple[str, ...]]] = []
        for part, layers in (("vision", self.vision.layers), ("decoder", self.decoder.layers)):
            for index, layer in enumerate(layers):
                assert isinstance(layer, Layer)
                site = f"{part}.layers.{index}"
                names = ("gate", "up") if isinstance(layer.mlp, GatedMlp) else ("up",)
                found.append((f"{site}.norm1", (f"{site}.attention.qkv",)))
                found.append((f"{site}.norm2", tuple(f"{site}.mlp.{name}" for name in names)))
        if not self.spec.decoder.tied and not self._cuts_see_norm():
            found.append(("decoder.norm", ("decoder.head",)))
        return found

    def _cuts_see_norm(self) -> bool:
        cuts = [cut for cut in self.decoder.cuts if isinstance(cut, CutModule)]
        return any(cut.looks_normed for cut in cuts)


def place(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a value in the place of a weight."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def _no_rows(spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Keys and values of no rows."""
    shape = (1, spec.num_kv_heads, 0, spec.head_dim)
    return torch.zeros(shape), torch.zeros(shape)
