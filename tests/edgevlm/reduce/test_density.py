"""Clusters by density, and the tokens made of what was pruned."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from edgevlm.reduce.density import density_clusters, numpy_density_clusters
from edgevlm.reduce.rests.recycle import Recycle
from edgevlm.reduce.view import View
from tests.edgevlm.reduce.views import call_view, in_torch

# Means of up to ten rows in float32.
TOLERANCE = 2e-6


def drawn(batch: int, count: int, size: float = 1.0, seed: int = 0) -> np.ndarray:
    """Rows [B, n, 16] around a few points."""
    random = np.random.default_rng(seed)
    points = random.standard_normal((batch, 4, 16))
    which = random.integers(0, 4, (batch, count))
    rows = np.take_along_axis(points, which[..., None], 1) + 0.3 * random.standard_normal(
        (batch, count, 16)
    )
    return (size * rows).astype(np.float32)


def clusters_in_torch(rows: np.ndarray, count: int, neighbours: int = 5) -> tuple[np.ndarray, ...]:
    """What torch makes of rows."""
    found = density_clusters(torch.from_numpy(rows), count, neighbours)
    return tuple(x.numpy() for x in found)


@pytest.mark.parametrize("size", [0.1, 1.0, 60.0])
@pytest.mark.parametrize("neighbours", [2, 5, 50])
def test_torch_is_the_twin(neighbours: int, size: float) -> None:
    """Of rows so far apart, too, that exp(-d^2) is zero for all of them in float32."""
    for seed in range(10):
        rows = drawn(2, 14, size, seed)
        for count in (1, 3, 14):
            got = clusters_in_torch(rows, count, neighbours)
            want = numpy_density_clusters(rows, count, neighbours)
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])


def test_as_many_clusters_as_rows_are_the_rows() -> None:
    rows = drawn(2, 9)
    centres, members = clusters_in_torch(rows, 9)
    np.testing.assert_array_equal(centres, np.tile(np.arange(9), (2, 1)))
    np.testing.assert_array_equal(members, np.tile(np.eye(9), (2, 1, 1)))


def test_every_row_is_in_one_cluster_and_a_centre_in_its_own() -> None:
    rows = drawn(3, 20)
    centres, members = clusters_in_torch(rows, 6)
    np.testing.assert_array_equal(members.sum(1), np.ones((3, 20)))
    for group in range(3):
        np.testing.assert_array_equal(members[group][np.arange(6), centres[group]], np.ones(6))


def test_equal_rows_have_one_centre() -> None:
    """The first of them; a second centre is another row as long as there is one."""
    rows = np.zeros((1, 8, 16), np.float32)
    rows[0, 5:, 0] = (3.0, 7.0, 12.0)
    centres, members = clusters_in_torch(rows, 4, 3)
    np.testing.assert_array_equal(centres, [[0, 5, 6, 7]])
    np.testing.assert_array_equal(members[0, 0], [1, 1, 1, 1, 1, 0, 0, 0])


def test_what_all_rows_share_changes_nothing() -> None:
    """Large common numbers, as rows of a decoder have them, take no digits from distances."""
    rows = drawn(1, 14)
    shifted = rows + np.float32(512.0)
    # What rounding left of the rows.
    want = numpy_density_clusters(shifted - np.float32(512.0), 4)
    got = clusters_in_torch(shifted, 4)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def recycled(
    rest: Recycle, view: View[np.ndarray], scores: np.ndarray, kept: np.ndarray, extra: int
) -> None:
    """Torch equals the twin."""
    want = rest.numpy(view, scores, kept, extra)
    tensors = torch.from_numpy(scores), torch.from_numpy(kept)
    got = rest.torch(in_torch(view), *tensors, extra)
    assert got.sizes is not None
    assert want.sizes is not None
    np.testing.assert_allclose(got.features.numpy(), want.features, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(got.places.numpy(), want.places)
    np.testing.assert_array_equal(got.sizes.numpy(), want.sizes)


@pytest.mark.parametrize("num_pictures", [1, 2])
@pytest.mark.parametrize("rest", [Recycle(), Recycle(share=0.8, per_cluster=3, neighbours=3)])
def test_recycled_tokens_are_those_of_the_twin(rest: Recycle, num_pictures: int) -> None:
    for seed in range(5):
        view = call_view(num_pictures=num_pictures, seed=seed)
        scores = np.random.default_rng(seed).random((num_pictures, 20)).astype(np.float32)
        extra = rest.extra(9, 20)
        kept = np.sort(np.argsort(-scores, axis=1)[:, : 9 - extra], axis=1)
        recycled(rest, view, scores, kept, extra)


def test_recycled_tokens_are_means_of_the_best_of_the_rest() -> None:
    """By hand, for one cluster."""
    view = call_view()
    scores = np.random.default_rng(1).permutation(20).astype(np.float32)[None]
    order = np.argsort(-scores[0])
    kept = np.sort(order[:8])[None]
    rest = Recycle(share=0.25)
    made = rest.torch(in_torch(view), torch.from_numpy(scores), torch.from_numpy(kept), 1)
    tokens = view.tokens.features[0]
    want = tokens[order[8:12]].mean(0)  # a quarter of twelve, and one
    assert made.sizes is not None
    np.testing.assert_array_equal(made.sizes[0].numpy(), [*np.ones(8), 4])
    np.testing.assert_array_equal(made.features[0, :8].numpy(), tokens[kept[0]])
    np.testing.assert_allclose(made.features[0, 8].numpy(), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rest", [Recycle(), Recycle(share=1.0, per_cluster=2)])
def test_numbers_of_tokens_made(rest: Recycle) -> None:
    """As published: of n pruned int(share * n) + 1 take part, for every ten one, and one more."""
    for num_tokens in (2, 20, 144, 576):
        for keep in range(2, num_tokens):
            extra = rest.extra(keep, num_tokens)
            pruned = num_tokens - (keep - extra)
            size = min(pruned, int(rest.share * pruned) + 1)
            assert extra == min(size // rest.per_cluster + 1, keep - 1)
            assert 1 <= extra <= size
        assert rest.extra(1, num_tokens) == rest.extra(0, num_tokens) == 0


def test_mass_is_kept() -> None:
    """I7: what takes part leaves as a whole."""
    view = call_view()
    scores = np.random.default_rng(2).random((1, 20)).astype(np.float32)
    kept = np.sort(np.argsort(-scores, axis=1)[:, :6], axis=1)
    rest = Recycle(share=1.0, per_cluster=4)
    made = rest.torch(in_torch(view), torch.from_numpy(scores), torch.from_numpy(kept), 4)
    assert made.sizes is not None
    got = (made.features * made.sizes[..., None]).sum(1).numpy()
    # Sums of twenty numbers of size 1.
    np.testing.assert_allclose(got, view.tokens.features.sum(1), atol=1e-5, rtol=0)


def test_padding_takes_no_part() -> None:
    """Rows of the call behind the tokens are no tokens."""
    view = call_view()
    scores = np.random.default_rng(2).random((1, 20)).astype(np.float32)
    kept = np.arange(0, 16, 2)[None]
    recycled(Recycle(), dataclasses.replace(view, call=None, probes={}), scores, kept, 1)
