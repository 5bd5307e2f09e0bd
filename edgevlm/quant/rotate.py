"""Orthogonal matrices that spread an outlier over all channels (QuaRot, Ashkboos et al., 2024).

A Hadamard matrix has entries of one size, so that a rotated channel is a mean of all, with signs.
Orders are 1, 2, those of Paley's two constructions (12, 20, 28, 36, 44, 60, ...), and these times
powers of two. For other sizes there are blocks of the largest power of two that divides them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(size: int, *, seed: int = 0) -> Tensor:
    """An orthogonal matrix [size, size], float64, whose rows are given random signs by `seed`.

    Channels mix in blocks of `mixing_size`. x R and W R give the product of x and W: R R^T = 1.
    """
    block = mixing_size(size)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    matrix: Tensor = torch.block_diag(*[_signs(block)] * (size // block))
    return matrix.mul_(signs / math.sqrt(block))


def mixing_size(size: int) -> int:
    """How many channels a rotation mixes: all where there is a Hadamard matrix of that size."""
    if size < 1:
        raise ValueError(f"a rotation of {size} channels")
    return size if _base(size) else size & -size


def _signs(order: int) -> Tensor:
    """A Hadamard matrix of an order that has a base, entries 1 and -1, float64."""
    base = _base(order)
    assert base, f"no Hadamard matrix of order {order}"
    matrix = torch.ones(1, 1, dtype=torch.float64) if base == 1 else _paley(base)
    doubled = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(doubled, matrix)
    return matrix


def _base(order: int) -> int:
    """The smallest order to double until `order` is reached; 0 where none is known."""
    candidate = order >> ((order & -order).bit_length() - 1)
    if candidate == 1:
        return 1
    while candidate <= order:
        if _is_paley(candidate):
            return candidate
        candidate *= 2
    return 0


def _is_paley(order: int) -> bool:
    """Whether one of Paley's constructions over a prime field gives this order."""
    return order % 4 == 0 and (_is_prime(order - 1) or _is_second_paley(order))


def _is_second_paley(order: int) -> bool:
    return order % 8 == 4 and _is_prime(order // 2 - 1)


def _paley(order: int) -> Tensor:
    """A Hadamard matrix of order q + 1, q = 3 mod 4, or of 2 (q + 1), q = 1 mod 4; q prime."""
    if _is_prime(order - 1):
        return _conference(order - 1) + torch.eye(order, dtype=torch.float64)
    conference = _conference(order // 2 - 1)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    eye = torch.eye(len(conference), dtype=torch.float64)
    return torch.kron(conference, off) + torch.kron(eye, on)


def _conference(prime: int) -> Tensor:
    """The matrix C [q + 1, q + 1] with C C^T = q: zeros on its diagonal, and signs elsewhere.

    C[i, j] is 1 where i - j is a square modulo q and -1 where it is none, behind a border; it is
    symmetric for q = 1 mod 4, else antisymmetric.
    """
    squares = torch.zeros(prime, dtype=torch.bool)
    squares[torch.arange(prime).square() % prime] = True
    character = torch.where(squares, 1.0, -1.0).double()
    character[0] = 0.0
    places = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0.0
    matrix[1:, 0] = 1.0 if prime % 4 == 1 else -1.0
    matrix[1:, 1:] = character[(places[:, None] - places) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % part for part in range(2, math.isqrt(number) + 1))
