"""Rotate what flows through the model, so that outliers spread over all channels (QuaRot, folded).

    - fold_norms: {}
    - rotate: {components: [decoder], heads: true}
    - quantize: {decoder: {scheme: w4a16, per_channel: true}}

A decoder's rows x become x Q, with Q orthogonal: tables and maps that write rows have Q multiplied
from behind, maps that read them undo it. A root mean square does not see a rotation, so norms stay
as they are once their weights are one. The last norm's weight goes into the head, which therefore
needs a table of its own where it was the embedding. `heads` rotates the values of every head in the
same way, by Q of the size of a head: what `attention.out` reads.
"""

# W width of the rows, D numbers of a head

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgevlm.errors import PassError
from edgevlm.passes.base import Change, Context, Foresight, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.model.spec import LayerSpec, VlmSpec
    from edgevlm.model.vlm import Vlm

ENCODER = "its rows become features, which are compared with the reference's channel by channel"
# Rows of a table that are turned at once, in float64.
CHUNK = 4096


class Rotate(Pass):
    """Random Hadamard rotations, in the weights alone."""

    name: ClassVar[str] = "rotate"
    lossless: ClassVar[bool] = True

    components: tuple[Literal["vision", "decoder"], ...] = Field(
        ("decoder",), min_length=1, description="Parts of the model that are rotated."
    )
    heads: bool = Field(False, description="Rotate the values of every head too.")

    def foresee(self, spec: VlmSpec, context: Context) -> Foresight:
        """Shapes stay; a head that was the embedding gets weights of its own."""
        if spec.is_quantized:
            raise PassError(
                "the maps that it rotates are quantized already",
                name=self.name,
                hint="put rotate before quantize",
            )
        if "decoder" not in self.components and not self.heads:
            raise PassError(
                "it names nothing to rotate: rows of the vision encoder stay",
                name=self.name,
                hint="add decoder to components, or set heads: true",
            )
        parts = []
        decoder = spec.decoder
        if "decoder" in self.components:
            _check_stages(spec)
            for site, layer in _layers(spec, "decoder"):
                for number, norm in enumerate((layer.norm1, layer.norm2), start=1):
                    _check_kind(f"{site}.norm{number}", norm.kind)
            _check_kind("decoder.norm", decoder.norm.kind)
            parts.append(f"rows of {decoder.width} in the decoder are rotated")
            if decoder.tied:
                size = _head_mib(spec)
                parts.append(
                    f"the head is no longer the embedding and takes {size:,.1f} MiB more as float32"
                )
                decoder = replace(decoder, tied=False)
        if self.heads:
            parts.append(f"values of heads are rotated in {' and '.join(self.components)}")
        return Foresight(spec=replace(spec, decoder=decoder), effect="; ".join(parts))

    def check(self, model: Vlm, context: Context) -> None:
        """Refuse norms whose weights were not folded; the last one's is, into the head."""
        import torch

        self.foresee(model.spec, context)
        if "decoder" not in self.components:
            return
        norms = [f"{s}.norm{n}" for s, _ in _layers(model.spec, "decoder") for n in (1, 2)]
        if not model.spec.decoder.tied:
            norms.append("decoder.norm")
        for site in norms:
            weight = model.get_submodule(site).get_parameter("weight")
            if not bool(torch.all(weight == 1)):
                raise PassError(
                    "the weight of the norm is not one, and a rotation does not commute with it",
                    name=self.name,
                    site=site,
                    hint="run fold_norms first",
                )

    def apply(self, model: Vlm, context: Context) -> Change:
        """Multiply the rotations into the weights."""
        import torch

        from edgevlm.quant.rotate import mixing_size

        spec, after = model.spec, self.foresee(model.spec, context).spec
        sites: list[str] = []
        measures: dict[str, float] = {}
        with torch.no_grad():
            if "decoder" in self.components:
                sites += _rotate_rows(model, context.seed)
                measures["mixed_channels"] = mixing_size(spec.decoder.width)
                measures["head_mib"] = _head_mib(spec) if spec.decoder.tied else 0.0
            for part in self.components if self.heads else ():
                for site, layer in _layers(spec, part):
                    sites += _rotate_values(model, site, layer, context.seed)
        model.spec, model.decoder.spec = after, after.decoder
        return Change(
            sites=tuple(dict.fromkeys(sites)),
            skipped={"vision": ENCODER} if "vision" in self.components else {},
            measures=measures,
        )


def _layers(spec: VlmSpec, part: str) -> Iterator[tuple[str, LayerSpec]]:
    layers = spec.vision.layers if part == "vision" else spec.decoder.layers
    for index, layer in enumerate(layers):
        yield f"{part}.layers.{index}", layer


def _check_stages(spec: VlmSpec) -> None:
    """What stages have learned is about the rows as they are."""
    reduction = spec.reduction
    if reduction is None:
        return
    names = ["the fusion"] if reduction.fusion is not None else []
    for stage in reduction.stages[0][1]:
        if stage.at in ("projector", "decoder"):
            names += [f"{x.name!r} of stage {stage.number}" for x in stage.pieces if x.is_learned]
    if names:
        raise PassError(
            f"{names[0]} has learned to read rows that are not rotated",
            name=Rotate.name,
            hint="leave decoder out of components",
        )


def _check_kind(site: str, kind: str) -> None:
    if kind != "rms":
        raise PassError(
            "the norm subtracts a mean, which a rotation does not keep",
            name=Rotate.name,
            site=site,
            hint="leave decoder out of components",
        )


def _head_mib(spec: VlmSpec) -> float:
    """What a table of the head's own takes."""
    return 4 * spec.decoder.vocab_size * spec.decoder.width / 2**20


def _rotate_rows(model: Vlm, seed: int) -> list[str]:
    """Rotate the decoder's rows, where they are written and where they are read."""
    from edgevlm.model.vlm import place
    from edgevlm.quant.rotate import hadamard

    spec = model.spec
    turn_WW = hadamard(spec.decoder.width, seed=seed)
    writes = ["projector.down" if spec.projector.hidden_width else "projector.linear"]
    reads = []
    for site, layer in _layers(spec, "decoder"):
        ups = ("gate", "up") if layer.mlp.gated else ("up",)
        reads += [f"{site}.attention.qkv", *(f"{site}.mlp.{name}" for name in ups)]
        writes += [f"{site}.attention.out", f"{site}.mlp.down"]
    if spec.decoder.tied:
        norm = model.decoder.norm.get_parameter("weight")
        place(model, "decoder.head.weight", model.embedding.get_parameter("weight") * norm)
        norm.fill_(1.0)
    tables = ["embedding", "decoder.head"]
    for site in (*tables, *reads):
        _turn_columns(model.get_submodule(site).get_parameter("weight"), turn_WW)
    for site in writes:
        for _, weight in model.get_submodule(site).named_parameters():
            # Rows of a weight, or a bias: either is multiplied from the left.
            weight.copy_(turn_WW.T @ weight.double())
    return [*tables, *(["decoder.norm"] if spec.decoder.tied else []), *writes, *reads]


def _rotate_values(model: Vlm, site: str, layer: LayerSpec, seed: int) -> list[str]:
    """Rotate the values of a layer, all heads alike, and undo it in what reads their mean."""
    from edgevlm.quant.rotate import hadamard

    spec = layer.attention
    turn_DD = hadamard(spec.head_dim, seed=seed)
    qkv, out = f"{site}.attention.qkv", f"{site}.attention.out"
    for _, weight in model.get_submodule(qkv).named_parameters():
        value = weight[spec.q_width + spec.kv_width :]
        heads = value.double().unflatten(0, (spec.num_kv_heads, spec.head_dim))
        turned = turn_DD.T @ heads if weight.dim() > 1 else heads @ turn_DD
        value.copy_(turned.flatten(0, 1))
    weight = model.get_submodule(out).get_parameter("weight")
    heads = weight.double().unflatten(1, (spec.num_heads, spec.head_dim))
    weight.copy_((heads @ turn_DD).flatten(1))
    return [qkv, out]


def _turn_columns(weight: Tensor, turn_KK: Tensor) -> None:
    """Multiply weights [N, K] from the right, in place and in float64, some rows at a time."""
    for part in weight.split(CHUNK):
        part.copy_(part.double() @ turn_KK)
