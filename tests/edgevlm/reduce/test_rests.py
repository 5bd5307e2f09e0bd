"""What becomes of the rest, against what the papers say of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgevlm.reduce.rests.anchors import Anchors
from edgevlm.reduce.rests.neighbours import Neighbours
from tests.edgevlm.reduce.early import NUM_TOKENS, Both, views

# Features of size one, summed over 24 tokens in float32.
TOLERANCE = 1e-5


def descending(batch: int = 1) -> torch.Tensor:
    """Scores that the first token has most of."""
    return torch.linspace(1.0, 0.1, NUM_TOKENS).expand(batch, NUM_TOKENS)


def first(count: int, batch: int = 1) -> torch.Tensor:
    """The rows that such scores keep."""
    return torch.arange(count).expand(batch, count)


@pytest.mark.parametrize(("count", "extra"), [(4, 1), (8, 5), (3, 10)])
def test_every_token_of_the_rest_goes_to_one_anchor(count: int, extra: int) -> None:
    both = views("none", 2)
    made = Anchors().torch(both.torch, descending(2), first(count, 2), extra)
    came = made.sizes[:, count:] - 1
    # VisionZip's counts: all of the rest but the anchors themselves.
    assert came.sum(1).tolist() == [NUM_TOKENS - count - extra] * 2
    assert torch.equal(made.sizes[:, :count], torch.ones(2, count))


def test_a_pool_leaves_the_others_out() -> None:
    made = Anchors(pool=2).torch(views().torch, descending(), first(6), 4)
    assert made.sizes.sum() == 6 + 2 * 4


def test_kept_tokens_stay_as_they_are() -> None:
    both = views()
    made = Anchors().torch(both.torch, descending(), first(7), 3)
    assert torch.equal(made.features[:, :7], both.torch.tokens.features[:, :7])


@pytest.mark.parametrize("average", [False, True])
def test_a_pool_of_all_is_visionzip(average: bool) -> None:
    # Where scores fall with places, DUET's anchors, which go by score, are those by place.
    both = views("class token", 2, seed=3)
    wide, given = Anchors(pool=NUM_TOKENS, average=average), (descending(2), first(5, 2), 4)
    found = wide.torch(both.torch, *given)
    wanted = Anchors(average=average).torch(both.torch, *given)
    assert torch.equal(found.places, wanted.places)
    torch.testing.assert_close(found.features, wanted.features, atol=TOLERANCE, rtol=0)
    assert torch.equal(found.sizes, wanted.sizes)


def test_anchors_are_at_even_steps_of_the_rest() -> None:
    made = Anchors().torch(views().torch, descending(), first(4), 5)
    # 20 are left: every fourth of them.
    assert made.places[0].tolist() == [0, 1, 2, 3, 4, 8, 12, 16, 20]


def test_an_anchor_alone_is_itself() -> None:
    both = views()
    made = Anchors().torch(both.torch, descending(), first(20), 4)
    assert torch.equal(made.features, both.torch.tokens.features)


def test_half_of_the_sum_is_the_average() -> None:
    both = views()
    given = (descending(), first(4), 2)
    total, mean = (Anchors(average=a).torch(both.torch, *given).features for a in (False, True))
    torch.testing.assert_close(total[:, 4:] / 2, mean[:, 4:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("share", "keep", "extra"), [(0.156, 192, 30), (0.156, 128, 20), (0.0228, 307, 7), (0.5, 2, 1)]
)
def test_anchors_are_a_share(share: float, keep: int, extra: int) -> None:
    assert Anchors(share=share).extra(keep, 576) == extra


def test_one_token_has_no_room_for_another() -> None:
    assert Anchors().extra(1, 24) == Neighbours().extra(1, 24) == 0


def unheard(both: Both, kept: int) -> np.ndarray:
    """What PruMerge makes where nobody attends to anything."""
    scores = torch.zeros(2, NUM_TOKENS)
    return Neighbours().torch(both.torch, scores, first(kept, 2), 1).features.numpy()


@pytest.mark.parametrize("kept", [5, NUM_TOKENS])
def test_without_attention_neighbours_add_a_token_of_zeros(kept: int) -> None:
    both = views("none", 2)
    found = unheard(both, kept)
    assert found.shape[1] == kept + 1
    assert np.array_equal(found[:, :-1], both.numpy.tokens.features[:, :kept])
    assert np.array_equal(found[:, -1], np.zeros_like(found[:, -1]))


def test_all_neighbours_are_the_sum_of_all_others() -> None:
    both = views("none")
    scores = descending()
    made = Neighbours(count=NUM_TOKENS - 1).torch(both.torch, scores, first(3), 1)
    x = both.torch.tokens.features[0]
    weighted = x * scores[0][:, None]
    everything = weighted.sum(0)
    for row in range(3):
        wanted = x[row] + everything - weighted[row]
        torch.testing.assert_close(made.features[0, row], wanted, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(made.features[0, 3], weighted[3:].sum(0), atol=TOLERANCE, rtol=0)
    # What is left stands where the first of it stood, for all of it.
    assert made.places.tolist() == [[0, 1, 2, 3]]
    assert made.sizes.tolist() == [[1.0, 1.0, 1.0, NUM_TOKENS - 3]]


def test_neighbours_may_be_kept_themselves() -> None:
    both = views("none")
    keys = both.torch.probes[-1].k
    # Two kept tokens have one key, and are nearest to each other.
    keys[:, 1] = keys[:, 0]
    scores = descending()
    made = Neighbours(count=1).torch(both.torch, scores, first(2), 1)
    x = both.torch.tokens.features
    for row, other in ((0, 1), (1, 0)):
        wanted = x[:, row] + scores[:, other, None] * x[:, other]
        torch.testing.assert_close(made.features[:, row], wanted, atol=TOLERANCE, rtol=0)
