"""What a scheme is, as data: how the weights of a linear map are stored, and what it multiplies.

    name      weights   activations   usual on
    w8a8      int8      int8          CPUs and NPUs, where products bound the time
    w8a16     int8      16 bits       NPUs (int16), CPUs (float)
    w4a16     int4      16 bits       where reading weights bounds the time
    w4a8      int4      int8          the same, with integer products
    w16a16    int16     int16         NPUs, where a float model is wanted
    fp8       float8    float8        NVIDIA parts

Names are those of compressed-tensors. Where activations of 16 bits stay float on a target, that is
finer than asked. What shares a scale: of weights a `channel` (a row of [N, K]) or a `group` of
columns of it; of activations the whole `tensor` or a row (`token`) of the call, found as it runs,
a `block` of columns of a row, or the whole tensor with a `static` scale from calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DTYPE_BITS", "SCHEMES", "ActivationQuant", "Scheme", "WeightQuant"]

DTYPE_BITS = {"int4": 4, "int8": 8, "int16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightQuant:
    """Weights [N, K] as integers or float8 with scales.

    `group_size` columns share a scale, 0 is a whole channel. `bits` are those used: an int8 may be
    kept to 7, where a processor adds pairs of products in 16 bits.
    """

    dtype: str
    bits: int
    group_size: int = 0
    symmetric: bool = True

    @property
    def granularity(self) -> str:
        """What shares a scale: `channel` or `group:32`."""
        return f"group:{self.group_size}" if self.group_size else "channel"

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of weights [rows, columns] with their float32 scales, and zero points."""
        groups = -(-columns // self.group_size) if self.group_size else 1
        # A short last group is stored whole.
        stored = groups * self.group_size if self.group_size else columns
        zeros = 0 if self.symmetric else rows * groups
        return rows * stored * DTYPE_BITS[self.dtype] // 8 + 4 * rows * groups + zeros


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationQuant:
    """What is multiplied: a dtype, and what shares a scale (`token`, `tensor`, `block`, `static`).

    `static` scales come from calibration, the others are found in every call. A `block` is a group
    of the weights. Constants have a zero point where they are not `symmetric`.
    """

    dtype: str
    scales: str
    symmetric: bool = False

    @property
    def is_static(self) -> bool:
        """Whether the scale is a constant of the graph."""
        return self.scales == "static"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """The quantization of one linear map; without `activations` it multiplies what it is given."""

    name: str
    weights: WeightQuant
    activations: ActivationQuant | None = None

    @property
    def needs_opset_21(self) -> bool:
        """Whether QuantizeLinear and DequantizeLinear of opset 19 cannot say it."""
        activations = "" if self.activations is None else self.activations.dtype
        is_new = self.weights.dtype in ("int4", "int16") or activations == "int16"
        return is_new or self.weights.group_size > 0

    def __str__(self) -> str:
        """Format as `w4a16 group:32`, with the scales of the activations where there are any."""
        scales = "" if self.activations is None else f" {self.activations.scales}"
        narrow = "" if self.weights.bits == DTYPE_BITS[self.weights.dtype] else " 7-bit"
        return f"{self.name} {self.weights.granularity}{narrow}{scales}"


SCHEMES = {
    "w4a16": ("int4", "int16"),
    "w4a8": ("int4", "int8"),
    "w8a16": ("int8", "int16"),
    "w8a8": ("int8", "int8"),
    "w16a16": ("int16", "int16"),
    "fp8": ("float8_e4m3fn", "float8_e4m3fn"),
}
"""Names of schemes: dtype of weights, dtype of activations."""
