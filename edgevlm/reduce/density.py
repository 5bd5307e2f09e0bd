"""Clusters around tokens that lie densely and far from denser ones (DPC-KNN, Du et al. 2016).

    d_ij    = |x_i - x_j| / sqrt(C)
    rho_i   = exp(-mean of d_ij^2 over the k nearest j, i among them)
    delta_i = min d_ij over denser j, the largest distance of all where i is the densest

Centres are the tokens of the largest rho * delta; every other token goes to its nearest centre. The
published code adds noise to rho so that no two are equal; here, of two equal ones the first is the
denser. What is compared is log rho + log delta, whose order is the same and which does not become
zero where tokens lie far apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# B groups, n tokens of each, C width, c clusters

FAR = 1e30
"""Behind every distance."""
NEAR = 1e-30
"""Added to the square of a distance, so that none has a logarithm too."""


def density_clusters(
    rows: Tensor, count: int, neighbours: int = 5, dense: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (centres [B, c] int64, ascending; members [B, c, n], ones and zeros) of [B, n, C].

    `dense` asks for forms without TopK and Gather.
    """
    import torch

    from edgevlm_export.ops import take_rows, top_rows

    num_rows, width = rows.shape[1:]
    places = torch.arange(num_rows)
    # What all rows have in common is in no difference, and takes digits from their products.
    rows = rows - rows.mean(1, keepdim=True)
    squares = (rows * rows).sum(-1)
    distance = squares[:, :, None] + squares[:, None] - 2.0 * (rows @ rows.mT)
    # Rounding leaves no distance to itself, and none below zero.
    is_same = (places[:, None] == places).to(rows.dtype)
    distance = distance.relu() * (1.0 - is_same) / width
    sparsity = _nearest(distance, min(neighbours, num_rows))
    ours, others = sparsity[:, :, None], sparsity[:, None]
    is_denser = (others < ours) | ((others == ours) & (places < places[:, None]))
    farthest = distance.amax((1, 2), keepdim=True)
    gap = torch.where(is_denser, distance, farthest).amin(-1)
    centres, _ = top_rows(0.5 * (gap + NEAR).log() - sparsity, count, dense)
    nearest = (-1.0 * take_rows(distance, centres, dense)).argmax(1, keepdim=True)
    goes = (nearest == torch.arange(count)[:, None]).to(rows.dtype)
    is_own = (centres[:, :, None] == places).to(rows.dtype)
    return centres, goes * (1.0 - is_own.sum(1, keepdim=True)) + is_own


def _nearest(distance: Tensor, count: int) -> Tensor:
    """The mean [B, n] of the smallest `count` of distances [B, n, n], taken one by one."""
    import torch

    places = torch.arange(distance.shape[1])
    total = distance[..., 0] * 0.0
    for _ in range(count):
        total = total + distance.amin(-1)
        place = (-1.0 * distance).argmax(-1, keepdim=True)
        distance = distance + FAR * (place == places).to(distance.dtype)
    return total / count


def numpy_density_clusters(
    rows: np.ndarray, count: int, neighbours: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """The twin of `density_clusters`, by definition."""
    batch, num_rows, width = rows.shape
    centres = np.zeros((batch, count), np.int64)
    members = np.zeros((batch, count, num_rows))
    for group, points in enumerate(rows.astype(np.float64)):
        distance = np.linalg.norm(points[:, None] - points, axis=-1) / np.sqrt(width)
        nearest = np.sort(distance, axis=1)[:, :neighbours]
        exponent = -np.square(nearest).mean(1)
        score = np.zeros(num_rows)
        for row in range(num_rows):
            denser = [
                other
                for other in range(num_rows)
                if (exponent[other], -other) > (exponent[row], -row)
            ]
            gap = distance[row, denser].min() if denser else distance.max()
            score[row] = exponent[row] + 0.5 * np.log(gap**2 + NEAR)
        centres[group] = np.sort(np.argsort(-score, kind="stable")[:count])
        for row in range(num_rows):
            place = int(distance[row, centres[group]].argmin())
            if row in centres[group]:
                place = list(centres[group]).index(row)
            members[group, place, row] = 1.0
    return centres, members
