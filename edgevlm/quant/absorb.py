"""Who can take the scale of an input: what stands before linear maps, and is linear in its output.

    input of           is divided by
    attention.qkv      the weights of the norm before it, and its bias
    mlp.gate, mlp.up   the same
    attention.out      the rows of qkv that make values: attention only averages them
    mlp.down           the rows of `up`, where it is multiplied by an activated gate
    decoder.head       the decoder's last norm, where the head is not the embedding
    projector.up       the projector's own norm, where it has one

A column of the maps that read the input is multiplied by what its channel was divided by, so that
all outputs stay. Several columns may come from one channel (query heads that share a value, patches
that share a norm), and have one scale.
"""

# K inputs of maps, C channels of what they come from

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgevlm.errors import PassError

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.model.spec import AttentionSpec, LayerSpec, ProjectorSpec, VlmSpec
    from edgevlm.model.vlm import Vlm

__all__ = ["Absorber", "absorbers", "divide", "scalable", "touched"]

PIXELS = "its input is pixels"
FEATURES = "its input leaves the vision encoder, and is compared with the reference there"
ACTIVATION = "an activation stands between it and {}, and is not linear"
TIED = "it is the embedding, whose rows nothing divides"


@dataclass(frozen=True, kw_only=True, slots=True)
class Absorber:
    """An input, the maps at `sites` that read it, and the `source` that can be divided instead.

    `unit` is the layer (or part) that all are in. The source is a norm, or a linear map whose rows
    from `first_row` make the input. Columns of the input are `outer` x `times` x `inner`, of which
    the `times` are of one channel.
    """

    unit: str
    sites: tuple[str, ...]
    source: str
    outer: int = 1
    times: int = 1
    inner: int
    first_row: int = 0

    @property
    def rows(self) -> slice:
        """The source's rows, or those of a norm's weight, one per channel."""
        return slice(self.first_row, self.first_row + self.outer * self.inner)

    def columns(self, channel_C: Tensor) -> Tensor:
        """Of each column [K] what its channel [C] has."""
        channel_OTI = channel_C.reshape(self.outer, 1, self.inner)
        return channel_OTI.expand(-1, self.times, -1).flatten()

    def mean(self, size_K: Tensor) -> Tensor:
        """Sizes [K], each the mean of those of its channel."""
        return self.columns(self._apart(size_K).mean(dim=1).flatten())

    def most(self, size_K: Tensor) -> Tensor:
        """Sizes [K], each the largest of those of its channel."""
        return self.columns(self._apart(size_K).amax(dim=1).flatten())

    def channels(self, size_K: Tensor) -> Tensor:
        """Of sizes [K] that are alike where the channel is the same, one for each channel [C]."""
        return self._apart(size_K)[:, 0].flatten()

    def _apart(self, size_K: Tensor) -> Tensor:
        return size_K.reshape(self.outer, self.times, self.inner)


@dataclass(frozen=True, slots=True)
class _Found:
    """Absorbers, and the maps that have none, with the reason."""

    absorbers: list[Absorber] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def layer(self, unit: str, width: int, layer: LayerSpec) -> None:
        """The four inputs of a layer."""
        up, down = f"{unit}.mlp.up", f"{unit}.mlp.down"
        ups = (f"{unit}.mlp.gate", up) if layer.mlp.gated else (up,)
        qkv = f"{unit}.attention.qkv"
        self.absorbers.extend(
            (
                Absorber(unit=unit, sites=(qkv,), source=f"{unit}.norm1", inner=width),
                _values(unit, layer.attention),
                Absorber(unit=unit, sites=ups, source=f"{unit}.norm2", inner=width),
            )
        )
        if layer.mlp.gated:
            made = Absorber(unit=unit, sites=(down,), source=up, inner=layer.mlp.width)
            self.absorbers.append(made)
        else:
            self.skipped[down] = ACTIVATION.format(up)

    def projector(self, spec: ProjectorSpec) -> None:
        """The projector's maps; only a norm of its own takes a scale."""
        if not spec.hidden_width:
            self.skipped["projector.linear"] = FEATURES
            return
        if spec.norm is None:
            self.skipped["projector.up"] = FEATURES
        else:
            made = Absorber(
                unit="projector",
                sites=("projector.up",),
                source="projector.norm",
                times=spec.merge**2,
                inner=spec.in_width,
            )
            self.absorbers.append(made)
        self.skipped["projector.down"] = ACTIVATION.format("projector.up")


def absorbers(
    spec: VlmSpec, components: Collection[str]
) -> tuple[tuple[Absorber, ...], dict[str, str]]:
    """The inputs of these components that can be scaled, and the maps whose input cannot.

    The reason is given for each of these. Both are in the order of computation.
    """
    found = _Found()
    if "vision" in components:
        if spec.vision.pixels == "patches":
            found.skipped["vision.embed.patch"] = PIXELS
        for index, layer in enumerate(spec.vision.layers):
            found.layer(f"vision.layers.{index}", spec.vision.width, layer)
    if "projector" in components:
        found.projector(spec.projector)
    if "decoder" in components:
        for index, layer in enumerate(spec.decoder.layers):
            found.layer(f"decoder.layers.{index}", spec.decoder.width, layer)
    if "head" in components:
        head = "decoder.head"
        if spec.decoder.tied:
            found.skipped[head] = TIED
        else:
            width = spec.decoder.width
            made = Absorber(unit=head, sites=(head,), source="decoder.norm", inner=width)
            found.absorbers.append(made)
    return tuple(found.absorbers), found.skipped


def scalable(
    name: str, spec: VlmSpec, components: Sequence[str]
) -> tuple[tuple[Absorber, ...], dict[str, str]]:
    """The inputs that can be scaled, and the maps that are left, each with the reason.

    Raises PassError of the pass `name` where there are none, or where they are quantized already.
    """
    if spec.is_quantized:
        raise PassError(
            "the maps that it scales are quantized already",
            name=name,
            hint=f"put {name} before quantize",
        )
    found, skipped = absorbers(spec, components)
    if not found:
        raise PassError(
            f"no input can be scaled ({'; '.join(sorted(set(skipped.values())))})",
            name=name,
            hint="name other components, or remove the pass",
        )
    return found, skipped


def touched(found: Sequence[Absorber]) -> tuple[str, ...]:
    """Every site that scaling changes, once."""
    sites = [site for absorber in found for site in (absorber.source, *absorber.sites)]
    return tuple(dict.fromkeys(sites))


def divide(model: Vlm, absorber: Absorber, scale_K: Tensor) -> None:
    """Divide an input by a scale [K], and multiply the columns of what reads it, in place."""
    channel_C = absorber.channels(scale_K)
    source = model.get_submodule(absorber.source)
    for name, weight in source.named_parameters(recurse=False):
        rows = weight[absorber.rows]
        rows.div_(channel_C if name == "bias" or weight.dim() == 1 else channel_C[:, None])
    for site in absorber.sites:
        model.get_submodule(site).get_parameter("weight").mul_(scale_K)


def _values(unit: str, spec: AttentionSpec) -> Absorber:
    """The rows of qkv that make values; query heads that share one lie side by side."""
    return Absorber(
        unit=unit,
        sites=(f"{unit}.attention.out",),
        source=f"{unit}.attention.qkv",
        outer=spec.num_kv_heads,
        times=spec.num_heads // spec.num_kv_heads,
        inner=spec.head_dim,
        first_row=spec.q_width + spec.kv_width,
    )
