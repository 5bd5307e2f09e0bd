"""Where the weights of our model come from: names and shapes in a checkpoint.

Checkpoints of one family differ in their prefixes (`language_model.model.` in old ones,
`model.language_model.` in new ones). A family says which prefixes mean the same section; the rest
of its names are relative to a section (`text.layers.0.mlp.up_proj.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgevlm.model.spec import AttentionSpec, LayerSpec, NormSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One tensor of a checkpoint; `shape` None means the shape of our weight."""

    name: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The tensors that one weight is made of, one after the other on axis 0.

    A part of another shape than its share of our weight is reshaped to it.
    """

    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part of a checkpoint: what its names start with there; `prefix` is the newest form."""

    name: str
    pattern: str
    prefix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """All of a family's weights: sections, a source for each weight of ours, and what is left out.

    `unused` are patterns of names that a checkpoint may have and our model does not need. `copies`
    are tensors that must equal a weight of ours (a tied head that was saved all the same).
    """

    sections: tuple[Section, ...]
    sources: Mapping[str, Source]
    unused: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)

    def relative(self, name: str) -> str:
        """A checkpoint's name, relative to its section."""
        for section in self.sections:
            found = re.match(section.pattern, name)
            if found:
                return f"{section.name}.{name[found.end() :]}"
        return name

    def absolute(self, name: str) -> str:
        """A relative name as the newest checkpoints write it."""
        head, _, rest = name.partition(".")
        prefixes = {section.name: section.prefix for section in self.sections}
        return f"{prefixes[head]}{rest}" if head in prefixes else name

    def is_unused(self, name: str) -> bool:
        """Whether a relative name is one that our model does not need."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNames:
    """What a checkpoint calls the parts of a layer; `qkv` is one name where q, k, v are packed.

    `mlp` has the names of our parts (`gate`, `up`, `down`) as keys.
    """

    norm1: str
    qkv: tuple[str, ...]
    out: str
    norm2: str
    mlp: Mapping[str, str]


def same(name: str, *, shape: tuple[int, ...] | None = None) -> Source:
    """A weight that is one tensor of the checkpoint."""
    return Source(parts=(Part(name=name, shape=shape),))


def linear(ours: str, theirs: str, *, bias: bool) -> Iterable[tuple[str, Source]]:
    """The weight of a linear map, and its bias where it has one."""
    yield f"{ours}.weight", same(f"{theirs}.weight")
    if bias:
        yield f"{ours}.bias", same(f"{theirs}.bias")


def norm(ours: str, theirs: str, spec: NormSpec) -> Iterable[tuple[str, Source]]:
    """The scale of a norm, and its shift where it has one."""
    return linear(ours, theirs, bias=spec.kind == "layer")


def fused_qkv(
    ours: str, theirs: tuple[str, ...], spec: AttentionSpec, width: int
) -> Iterable[tuple[str, Source]]:
    """q, k and v, which are one tensor here, and one or three in the checkpoint."""
    if len(theirs) == 1:
        yield from linear(ours, theirs[0], bias=spec.qkv_bias)
        return
    rows = (spec.q_width, spec.kv_width, spec.kv_width)
    named = tuple(zip(theirs, rows, strict=True))
    parts = tuple(Part(name=f"{name}.weight", shape=(size, width)) for name, size in named)
    yield f"{ours}.weight", Source(parts=parts)
    if spec.qkv_bias:
        parts = tuple(Part(name=f"{name}.bias", shape=(size,)) for name, size in named)
        yield f"{ours}.bias", Source(parts=parts)


def layer_weights(
    ours: str, theirs: str, names: LayerNames, spec: LayerSpec, width: int
) -> Iterable[tuple[str, Source]]:
    """One layer of `width`, from the names of its parts below `theirs`."""
    attention = spec.attention
    qkv = tuple(f"{theirs}.{name}" for name in names.qkv)
    yield from norm(f"{ours}.norm1", f"{theirs}.{names.norm1}", spec.norm1)
    yield from fused_qkv(f"{ours}.attention.qkv", qkv, attention, width)
    yield from linear(f"{ours}.attention.out", f"{theirs}.{names.out}", bias=attention.out_bias)
    yield from norm(f"{ours}.norm2", f"{theirs}.{names.norm2}", spec.norm2)
    for part, name in names.mlp.items():
        yield from linear(f"{ours}.mlp.{part}", f"{theirs}.{name}", bias=spec.mlp.bias)
