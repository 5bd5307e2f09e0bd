"""The vision-language model: vision, projector, embedding and decoder, built from a spec."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from edgevlm.model.attention import DeltaCache, FullCache, KeySource
from edgevlm.model.layers import GatedMlp, Layer
from edgevlm.model.norms import build_norm
from edgevlm.model.projector import build_projector
from edgevlm.model.quantized import QuantEmbedding, QuantLinear
from edgevlm.model.rope import rope_tables
from edgevlm.model.spec import AttentionSpec, DecoderSpec, VlmSpec
from edgevlm.model.vision import Vision, grid_tables
from edgevlm_export.ops import causal_mask, logits


class Head(nn.Linear):
    """Rows to logits; in a graph the weight keeps its layout, which a tied table shares."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., W] to [..., V]."""
        return logits(x, self.weight)


class Decoder(nn.Module):
    """Layers, norm and head."""

    def __init__(self, spec: DecoderSpec) -> None:
        """Build the layers as their specs say."""
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(Layer(spec.width, layer) for layer in spec.layers)
        self.norm = build_norm(spec.width, spec.norm)
        self.head: nn.Module = Head(spec.width, spec.vocab_size, bias=False)

    def forward(
        self, x: Tensor, keys: Sequence[KeySource], logit_rows: Tensor | None = None
    ) -> Tensor:
        """Map rows [1, T, W] to logits [1, T, V], or [1, R, V] of the rows wanted.

        `keys` has one source per layer.
        """
        for layer, source in zip(self.layers, keys, strict=True):
            x = layer(x, source)
        if logit_rows is not None:
            x = x.index_select(1, logit_rows)
        out: Tensor = self.head(self.norm(x))
        return out


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

    def split_phases(self) -> None:
        """Give prompts a decoder of their own, which shares every weight until one is replaced."""
        shared = {id(weight): weight for weight in self.decoder.parameters()}
        self.prefill = copy.deepcopy(self.decoder, shared)
        self.prefill.head = self.decoder.head

    def encode(self, pixels: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map pixels [N, ...] of pictures (or tiles) of one grid to image rows [N, tokens, W]."""
        grid = self.spec.vision.grids[0] if grid is None else grid
        features = self.vision(pixels, grid_tables(self.spec.vision, grid))
        rows: Tensor = self.projector(features, grid)
        return rows

    def embed(self, token_ids: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """Rows [1, T, W] of a prompt [T]: image rows [M, W] stand where the image token is."""
        rows: Tensor = self.embedding(token_ids)
        if image_rows is not None:
            rows = rows.clone()
            rows[token_ids == self.spec.image_token_id] = image_rows
        return rows[None]

    def forward(self, rows: Tensor, positions: Tensor, logit_rows: Tensor | None = None) -> Tensor:
        """Logits of a whole sequence of rows [1, T, W] at positions [T] or [3, T], as a prompt."""
        return self.whole(self.prefill or self.decoder, rows, positions, logit_rows)

    def whole(
        self,
        decoder: Decoder,
        rows: Tensor,
        positions: Tensor,
        logit_rows: Tensor | None = None,
    ) -> Tensor:
        """The same by one of the decoders."""
        cos, sin = rope_tables(self.spec.decoder.rope, positions)
        keys = [FullCache(cos, sin) for _ in decoder.layers]
        logits: Tensor = decoder(rows, keys, logit_rows)
        return logits

    def answer(self, rows: Tensor, positions: Tensor, num_prompt: int) -> Tensor:
        """Logits [T - P + 1, V] of the last of P prompt rows, and of the rows [1, T, W] after it.

        A decoder of its own reads the prompt where there is one, and the answer's rows follow in
        one call: none of them may see what rounds another.
        """
        wanted = torch.arange(num_prompt - 1, rows.shape[1])
        if self.prefill is None:
            return self.whole(self.decoder, rows, positions, wanted)[0]
        past = [_no_rows(layer.attention) for layer in self.spec.decoder.layers]
        begin, logits = 0, []
        for decoder, end in ((self.prefill, num_prompt), (self.decoder, rows.shape[1])):
            if end > begin:
                part = rows[:, begin:end], positions[..., begin:end]
                wanted = torch.arange(end - begin)[-1 if begin == 0 else 0 :]
                out, past = self._extend(decoder, *part, past, wanted)
                logits.append(out[0])
            begin = end
        return torch.cat(logits)

    def _extend(
        self,
        decoder: Decoder,
        rows: Tensor,
        positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
        logit_rows: Tensor,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [1, R, V] of more rows [1, T, W], and the cache with them."""
        cos, sin = rope_tables(self.spec.decoder.rope, positions)
        used, new = past[0][0].shape[2], rows.shape[1]
        keys = []
        for layer, (key, value) in zip(self.spec.decoder.layers, past, strict=True):
            mask = causal_mask(new, used + new, layer.attention.window or 0)
            keys.append(DeltaCache(key, value, mask[None, None], cos, sin))
        logits = decoder(rows, keys, logit_rows)
        longer = [
            (torch.cat([old_key, source.key], 2), torch.cat([old_value, source.value], 2))
            for (old_key, old_value), source in zip(past, keys, strict=True)
        ]
        return logits, longer

    @torch.no_grad()
    def greedy(self, rows: Tensor, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Continue a prompt of rows [1, T, W]: an endless stream of (token, its logits [V]).

        Positions are [T] or [3, T]; a new token stands one after the largest of them.
        """
        past = [_no_rows(layer.attention) for layer in self.spec.decoder.layers]
        next_position = int(positions.max()) + 1
        decoder = self.prefill or self.decoder
        while True:
            last = torch.tensor([rows.shape[1] - 1])
            out, past = self._extend(decoder, rows, positions, past, last)
            logits, decoder = out[0, 0], self.decoder
            token = int(logits.argmax())
            yield token, logits
            rows = self.embedding(torch.tensor([[token]]))
            positions = torch.full((*positions.shape[:-1], 1), next_position)
            next_position += 1

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
