"""Rotary frequencies, from the rope fields of a config, old names and new.

New configs hold all of it in `rope_parameters`; old ones have `rope_theta` beside `rope_scaling`,
which names its kind `type`. Frequencies are computed in float32, as transformers does: at a far
position the last bit of a frequency is visible.

`dynamic` scaling grows the base only beyond `max_position_embeddings`, which no bundle reaches, so
up to there it is the default.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgevlm.families.fields import Fields
from edgevlm.model.spec import RopeSpec

KINDS = ("default", "dynamic", "linear", "llama3", "yarn")
RopeTable = tuple[NDArray[np.float32], float]


def rope_spec(
    fields: Fields, *, head_dim: int, max_positions: int, theta: float, has_mrope: bool = False
) -> RopeSpec:
    """Read the rope fields of a text section.

    `theta` is the default base. With `has_mrope`, frequencies are shared out to three positions
    (arXiv 2409.12191, Qwen2-VL).
    """
    base = fields.take("rope_theta", float, theta)
    name = "rope_scaling" if "rope_scaling" in fields else "rope_parameters"
    fields.ignore("rope_scaling", "rope_parameters")
    rope = fields.section(name) if name in fields else Fields({}, family=fields.family)
    # A config that was written by one release and rewritten by another has both names.
    fields.only("partial_rotary_factor", 1.0)
    rope.only("partial_rotary_factor", 1.0)

    kind_name = "rope_type" if "rope_type" in rope else "type"
    rope.ignore("rope_type", "type")
    kinds = {kind: kind for kind in KINDS} | ({"mrope": "default"} if has_mrope else {})
    kind = rope.choice(kind_name, kinds, "default")
    base = rope.take("rope_theta", float, base)
    inv_freq = _default(head_dim, base)
    scaling = 1.0
    if kind == "linear":
        inv_freq = inv_freq / np.float32(rope.take("factor", float))
    elif kind == "llama3":
        inv_freq = _llama3(rope, inv_freq, max_positions)
    elif kind == "yarn":
        inv_freq, scaling = _yarn(rope, head_dim, base, max_positions)
    elif kind == "dynamic":
        rope.ignore("factor", "original_max_position_embeddings")

    axes: tuple[int, ...] = ()
    if has_mrope:
        axes = tuple(rope.take("mrope_section", list, [16, 24, 24]))
        if len(axes) != 3 or sum(axes) != len(inv_freq):
            raise rope.error(
                f"mrope_section is {list(axes)}, expected three numbers that add up to "
                f"{len(inv_freq)}, half the head size"
            )
    rope.finish()
    return RopeSpec(
        inv_freq=tuple(float(x) for x in inv_freq), attention_scaling=scaling, sections=axes
    )


def _default(head_dim: int, base: float) -> NDArray[np.float32]:
    """One frequency per pair of features."""
    return (1.0 / _periods(head_dim, base)).astype(np.float32)


def _periods(head_dim: int, base: float) -> NDArray[np.float32]:
    """Inverse frequencies, which are powers of the base."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods: NDArray[np.float32] = np.power(np.float32(base), exponents)
    return periods


def _llama3(rope: Fields, inv_freq: NDArray[np.float32], max_positions: int) -> NDArray[np.float32]:
    """Low frequencies are divided, high ones kept, those between blended (Llama 3.1)."""
    factor = np.float32(rope.take("factor", float))
    low = np.float32(rope.take("low_freq_factor", float))
    high = np.float32(rope.take("high_freq_factor", float))
    context = np.float32(rope.take("original_max_position_embeddings", int, max_positions))
    wavelength = np.float32(2 * math.pi) / inv_freq
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = np.where(wavelength > context / low, inv_freq / factor, blended)
    return np.where(wavelength < context / high, inv_freq, scaled)


def _yarn(rope: Fields, head_dim: int, base: float, max_positions: int) -> RopeTable:
    """Interpolation for low frequencies, extrapolation for high ones (arXiv 2309.00071)."""
    context = rope.take("original_max_position_embeddings", int, max_positions)
    factor = rope.take("factor", float, max_positions / context)
    scale, all_dims = rope.maybe("mscale", float), rope.maybe("mscale_all_dim", float)
    attention_factor = rope.maybe("attention_factor", float)
    fast = rope.take("beta_fast", float, 32.0)
    slow = rope.take("beta_slow", float, 1.0)
    truncate = rope.take("truncate", bool, True)
    if attention_factor is None:
        attention_factor = _magnitude(factor, 1.0)
        if scale and all_dims:
            attention_factor = _magnitude(factor, scale) / _magnitude(factor, all_dims)

    def dimension(rotations: float) -> float:
        """The feature pair that turns so many times over the original context."""
        turns = math.log(context / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(base))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    keep = 1 - np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    periods = _periods(head_dim, base)
    inv_freq = 1 / (np.float32(factor) * periods) * (1 - keep) + 1 / periods * keep
    return inv_freq.astype(np.float32), attention_factor


def _magnitude(factor: float, scale: float) -> float:
    """How much longer contexts sharpen attention."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
