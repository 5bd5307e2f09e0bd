"""The vision-language model: vision, projector, embedding and decoder, built from a spec."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgevlm.model.attention import (
    Angles,
    DeltaCache,
    FullCache,
    TurnedSource,
    Watched,
    unpacked,
)
from edgevlm.model.layers import GatedMlp, Layer
from edgevlm.model.norms import build_norm
from edgevlm.model.projector import build_projector
from edgevlm.model.quantized import QuantEmbedding, QuantLinear
from edgevlm.model.rope import rope_tables
from edgevlm.model.spec import AttentionSpec, DecoderSpec, VlmSpec
from edgevlm.model.stages import (
    Asking,
    CutModule,
    Grid,
    Pictures,
    Seen,
    cut_modules,
    probe_of,
    project,
    stage_modules,
    visual_tokens,
)
from edgevlm.model.vision import Vision, grid_tables
from edgevlm.reduce.seq import Probe, VisSeq
from edgevlm.reduce.view import View
from edgevlm_export.ops import causal_mask, logits

Observe = Callable[[Tensor, Tensor], None]
"""Is shown what a cache would hold."""


class Head(nn.Linear):
    """Rows to logits; in a graph the weight keeps its layout, which a tied table shares."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., W] to [..., V]."""
        return logits(x, self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of a decoder call between two layers.

    `x` [1, T, W]. `wanted` are those that logits are wanted for, None for all. `pictures` says
    where visual tokens stand, None where none may be taken away. `before` is what the layer before
    attended with, where a stage looks back at it.
    """

    x: Tensor
    wanted: Tensor | None
    pictures: Pictures | None = None
    before: Probe[Tensor] | None = None


class Decoder(nn.Module):
    """Layers, norm and head, and the stages between layers that take visual tokens away."""

    def __init__(self, spec: DecoderSpec) -> None:
        """Build the layers as their specs say."""
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(Layer(spec.width, layer) for layer in spec.layers)
        self.norm = build_norm(spec.width, spec.norm)
        self.head: nn.Module = Head(spec.width, spec.vocab_size, bias=False)
        self.cuts = nn.ModuleList()

    def forward(
        self,
        x: Tensor,
        keys: Sequence[TurnedSource],
        logit_rows: Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> Tensor:
        """Map rows [1, T, W] to logits [1, T, V], or [1, R, V] of the rows wanted.

        `keys` has one source per layer. With `pictures` the rows are a whole prompt, perhaps with
        an answer, of which stages take visual tokens away; without, all rows pass all layers.
        """
        rows = self.entered(x, logit_rows, pictures)
        for index in range(len(self.layers)):
            rows = self.step(index, rows, keys)
        x = rows.x
        if rows.wanted is not None:
            x = x.index_select(1, rows.wanted)
        out: Tensor = self.head(self.norm(x))
        return out

    def entered(self, x: Tensor, logit_rows: Tensor | None, pictures: Pictures | None) -> Rows:
        """Rows as they come to the first layer."""
        cuts = [cut.stage for cut in self.cuts if isinstance(cut, CutModule)]
        if not cuts:
            pictures = None
        if pictures is not None and any("raters" in cut.queries for cut in cuts):
            pictures = pictures.with_raters(x, cuts[0].count_in)
        return Rows(x=x, wanted=logit_rows, pictures=pictures)

    def step(self, index: int, rows: Rows, keys: Sequence[TurnedSource]) -> Rows:
        """Pass one layer, and the stage before it where there is one."""
        layer, source = self.layers[index], keys[index]
        assert isinstance(layer, Layer)
        if rows.pictures is None:
            return replace(rows, x=layer(rows.x, source))
        cut, following = self._cut_before(index), self._cut_before(index + 1)
        if cut is not None:
            rows = self._narrowed(cut, index, rows, keys)
        if following is None or not following.looks_back:
            return replace(rows, x=layer(rows.x, source))
        watched = Watched(source)
        x = layer(rows.x, watched)
        assert watched.q is not None
        assert watched.k is not None
        tables = source.angles.cos, source.angles.sin
        before = probe_of(layer.spec.attention, watched.q, watched.k, angles=tables)
        return replace(rows, x=x, before=before)

    def _cut_before(self, index: int) -> CutModule | None:
        """The stage before a layer, if one stands there."""
        for module in self.cuts:
            assert isinstance(module, CutModule)
            if module.stage.layer == index:
                return module
        return None

    def _narrowed(
        self, cut: CutModule, index: int, rows: Rows, keys: Sequence[TurnedSource]
    ) -> Rows:
        """The rows that a stage leaves; the layers behind it turn as these do."""
        layer, pictures, stage = self.layers[index], rows.pictures, cut.stage
        assert isinstance(layer, Layer)
        assert pictures is not None
        above = keys[index - 1].angles
        tables = above.cos, above.sin
        probes: dict[int | str, Probe[Tensor]] = {}
        if cut.looks_here:
            spec = layer.spec.attention
            q, k, _ = unpacked(spec, *layer.attention.project(layer.norm1(rows.x)))
            probes["own"] = probe_of(spec, q, k, angles=tables)
        if rows.before is not None:
            probes["previous"] = rows.before
        call = pictures.call(rows.x)
        tokens = visual_tokens(call, stage)
        chosen = cut(View(tokens=tokens, probes=probes, call=call))
        keys[index].angles.follow(tables, chosen)
        wanted = rows.wanted
        if wanted is not None:
            # -1 stays the last row, others move up by what is gone before them.
            moved = (chosen < wanted[:, None]).sum(-1)
            wanted = torch.where(wanted < 0, wanted, moved)
        return Rows(
            x=rows.x.index_select(1, chosen),
            wanted=wanted,
            pictures=pictures.narrowed(chosen, stage.count_in - stage.count_out),
        )


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
        for decoder in (self.decoder, self.prefill):
            if decoder is not None:
                decoder.cuts = cut_modules(spec)

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
        seen = self.vision.see(pixels, grid_tables(self.spec.vision, grid), grid)
        return self.project(seen, grid, question)

    def project(
        self, seen: Seen, grid: tuple[int, int], question: Asking | None = None
    ) -> VisSeq[Tensor]:
        """Features [N, rows, out_width] of pictures to rows of the decoder [N, tokens, W]."""
        return project(self.spec, self.projector, self.reduce, seen, grid, question)

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
        keys = self.whole_keys(positions)
        logits: Tensor = decoder(rows, keys, logit_rows, pictures)
        return logits

    def whole_keys(
        self, positions: Tensor, observe: Sequence[Observe] | None = None
    ) -> list[FullCache]:
        """The sources of a whole sequence, each shown to its observer of what a cache holds."""
        cos, sin = rope_tables(self.spec.decoder.rope, positions)
        keys: list[FullCache] = []
        for segment in self.spec.segments:
            # Positions that count on by one are packed by leaving out the last of them.
            angles = Angles(cos, sin, is_own=segment.is_packed or segment.first == 0)
            for layer in range(segment.first, segment.end):
                keys.append(FullCache(angles, None if observe is None else observe[layer]))
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
        tokens = self.spec.segments[0].tokens
        for segment in self.spec.segments:
            used = past[segment.first][0].shape[2]
            gone = length - used if segment.is_packed else 0
            cos, sin = rope_tables(self.spec.decoder.rope, positions - gone)
            is_own = segment.is_packed or segment.first == 0 or pictures is None
            angles = Angles(cos, sin, is_own=is_own)
            here = new - num_groups * (tokens - segment.tokens)
            for index in range(segment.first, segment.end):
                window = self.spec.decoder.layers[index].attention.window or 0
                mask = causal_mask(here, used + here, window)
                keys.append(DeltaCache(*past[index], mask[None, None], angles))
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
        rows are gathered into squares, and the decoder's last where its head is the embedding.
        """
        found: list[tuple[str, tuple[str, ...]]] = []
        for part, layers in (("vision", self.vision.layers), ("decoder", self.decoder.layers)):
            for index, layer in enumerate(layers):
                assert isinstance(layer, Layer)
                site = f"{part}.layers.{index}"
                names = ("gate", "up") if isinstance(layer.mlp, GatedMlp) else ("up",)
                found.append((f"{site}.norm1", (f"{site}.attention.qkv",)))
                found.append((f"{site}.norm2", tuple(f"{site}.mlp.{name}" for name in names)))
        if not self.spec.decoder.tied:
            found.append(("decoder.norm", ("decoder.head",)))
        return found


def place(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a value in the place of a weight."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def _no_rows(spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Keys and values of no rows."""
    shape = (1, spec.num_kv_heads, 0, spec.head_dim)
    return torch.zeros(shape), torch.zeros(shape)
