"""Merges: what they conserve, and what their papers say of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.document import Complaint
from edgevlm.model.attention import AllRows, Attention, WeightedRows
from edgevlm.model.spec import AttentionSpec
from edgevlm.reduce.merges.bipartite import Bipartite
from edgevlm.reduce.merges.clusters import Clusters
from edgevlm.reduce.merges.fuse import Fuse
from edgevlm.reduce.order import even_steps, in_order
from edgevlm.reduce.piece import Merge
from tests.edgevlm.reduce.early import NUM_TOKENS, Both, views

MERGES: dict[str, Merge] = {
    "bipartite": Bipartite(),
    "features": Bipartite(metric="features"),
    "rounds": Bipartite(rounds=4),
    "clusters": Clusters(),
}


def sized(batch: int, **options: Any) -> Both:
    """A view of tokens that were merged already, in float64."""
    sizes = np.random.default_rng(0).integers(1, 6, (batch, NUM_TOKENS)).astype(np.float64)
    return views("none", batch, dtype=np.float64, **options).tokens(sizes=sizes)


def deaf(both: Both) -> Both:
    """The same where all tokens receive the same attention."""
    for view in (both.torch, both.numpy):
        view.probes["own"].q[...] = 0.0
    return both


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [12, 17, 23, 24])
@pytest.mark.parametrize("name", [*MERGES, "fuse"])
def test_mass_is_conserved(name: str, count: int, batch: int) -> None:
    both = deaf(sized(batch, seed=count))
    merge = MERGES.get(name, Fuse())
    before, after = both.torch.tokens, merge.torch(both.torch, count)
    # Float64: sums of 24 numbers of size 15.
    torch.testing.assert_close(after.sizes.sum(1), before.sizes.sum(1), atol=1e-12, rtol=0)
    mass = (before.features * before.sizes[..., None]).sum(1)
    merged = (after.features * after.sizes[..., None]).sum(1)
    torch.testing.assert_close(merged, mass, atol=1e-11, rtol=0)


@pytest.mark.parametrize("every", [1, 3])
def test_fused_tokens_count_all_that_came(every: int) -> None:
    both = sized(2)
    merged = Fuse(every=every).torch(both.torch, 13)
    wanted = both.torch.tokens.sizes.sum(1)
    torch.testing.assert_close(merged.sizes.sum(1), wanted, atol=1e-12, rtol=0)


def layer() -> Attention:
    """A layer of attention of four heads with weights of size one."""
    spec = AttentionSpec(
        num_heads=4, num_kv_heads=4, head_dim=6, scale=6**-0.5, qkv_bias=True, out_bias=True
    )
    torch.manual_seed(0)
    return Attention(20, spec).double()


def test_sizes_of_one_weigh_nothing() -> None:
    attention, x = layer(), views("none", 2, dtype=np.float64).torch.tokens.features
    weighted = attention(x, WeightedRows(torch.ones(2, NUM_TOKENS, dtype=torch.float64)))
    torch.testing.assert_close(weighted, attention(x, AllRows()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("metric", ["keys", "features"])
def test_the_others_do_not_see_that_twins_were_merged(metric: str) -> None:
    attention, both = layer(), views("none", 2, dtype=np.float64)
    view = both.torch
    # Tokens 4 and 9, one of either half, are one, and so are their keys.
    view.tokens.features[:, 9] = view.tokens.features[:, 4]
    own = view.probes["own"]
    own.k[:, 9] = own.k[:, 4]
    merged = in_order(Bipartite(metric=metric).torch(view, NUM_TOKENS - 1))
    left = [row for row in range(NUM_TOKENS) if row != 9]
    assert merged.places.tolist() == [left, left]
    assert merged.sizes[0].tolist() == [2.0 if row == 4 else 1.0 for row in left]
    before = attention(view.tokens.features, AllRows())
    after = attention(merged.features, WeightedRows(merged.sizes))
    torch.testing.assert_close(after, before[:, left], atol=1e-12, rtol=0)


def test_fuse_without_criteria_is_bipartite_by_features() -> None:
    for seed in range(5):
        both = deaf(views("none", 2, seed=seed, dtype=np.float64))
        found = Fuse(both_ways=False).torch(both.torch, 15)
        wanted = Bipartite(metric="features").torch(both.torch, 15)
        assert torch.equal(found.places, wanted.places)
        torch.testing.assert_close(found.features, wanted.features, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.sizes, wanted.sizes, atol=1e-12, rtol=0)


def test_hot_criteria_do_not_choose() -> None:
    both = sized(2, seed=4)
    found = Fuse(attention=1e9, size=1e9, both_ways=False).torch(both.torch, 15)
    wanted = Bipartite(metric="features").torch(both.torch, 15)
    # Who goes where is the same; what received more attention weighs more in the mean.
    assert torch.equal(found.places, wanted.places)
    torch.testing.assert_close(found.sizes, wanted.sizes, atol=1e-12, rtol=0)


def test_fuse_spares_what_is_attended_to() -> None:
    both = views("none", dtype=np.float64)
    view = both.torch
    # All tokens are alike; four receive most attention.
    view.tokens.features[...] = 1.0
    own = view.probes["own"]
    own.q[...] = 1.0
    own.k[...] = 0.0
    own.k[:, [2, 5, 8, 11]] = 3.0
    merged = Fuse().torch(view, 14)
    alone = merged.places[merged.sizes == 1.0].tolist()
    assert {2, 5, 8, 11} <= set(alone)


def test_halves_go_both_ways() -> None:
    both = views("none", dtype=np.float64)
    merged = Fuse().torch(both.torch, 17)
    # Seven go: three from even to odd places, four from odd to even ones; even ones are first.
    one_way = Fuse(both_ways=False).torch(both.torch, 17)
    assert merged.places.shape == one_way.places.shape == (1, 17)
    assert (merged.sizes[:, 9:] > 1).sum() <= 3
    assert merged.sizes[:, :9].sum() + merged.sizes[:, 9:].sum() == NUM_TOKENS


@pytest.mark.parametrize("name", [*MERGES, "fuse"])
def test_a_token_stands_where_the_first_of_it_stood(name: str) -> None:
    both = views("none", 2, dtype=np.float64)
    view = both.torch
    # Tokens count themselves: features of one 1 each are means of members.
    ones = torch.eye(NUM_TOKENS, dtype=torch.float64).expand(2, -1, -1)
    tokens = replace(view.tokens, features=ones + 0.01 * torch.rand_like(ones))
    merged = MERGES.get(name, Fuse()).torch(replace(view, tokens=tokens), 13)
    members = merged.features > 0.03
    assert (members.sum(1) == 1).all(), "every token is in one"
    assert torch.equal(members.sum(2).double(), merged.sizes)
    if name != "clusters":
        assert torch.equal(members.double().argmax(2), merged.places)


@pytest.mark.parametrize("name", ["bipartite", "features", "fuse"])
def test_of_equal_pairs_the_lowest_merge(name: str) -> None:
    both = deaf(views("none").tokens(features=np.ones((1, NUM_TOKENS, 4), np.float32)))
    both.torch.probes["own"].k[...] = 1.0
    merge = {**MERGES, "fuse": Fuse(both_ways=False)}[name]
    found = in_order(merge.torch(both.torch, 20))
    # Tokens 0, 2, 4 and 6 go to the first odd one.
    assert found.places.tolist() == [[0, 3, 5, *range(7, NUM_TOKENS)]]
    assert found.sizes.tolist() == [[5.0, *[1.0] * 19]]


def test_as_many_clusters_as_tokens_are_the_tokens() -> None:
    both = sized(2)
    found = Clusters().torch(both.torch, NUM_TOKENS)
    tokens = both.torch.tokens
    assert torch.equal(found.places, tokens.places)
    torch.testing.assert_close(found.features, tokens.features, atol=1e-12, rtol=0)


def test_clusters_find_the_groups() -> None:
    # Three heaps far apart, and tokens that lie close in each.
    drawn = np.random.default_rng(0)
    heap = np.arange(NUM_TOKENS) % 3
    features = 20.0 * np.eye(20)[heap] + 0.1 * drawn.standard_normal((1, NUM_TOKENS, 20))
    both = views("none", dtype=np.float64).tokens(features=features)
    found = Clusters().torch(both.torch, 3)
    assert found.sizes.tolist() == [[8.0, 8.0, 8.0]]
    for row, place in enumerate(found.places[0].tolist()):
        wanted = features[0, heap == heap[place]].mean(0)
        np.testing.assert_allclose(found.features[0, row].numpy(), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_tokens_are_clusters_in_order(count: int) -> None:
    both = views("none", 2).tokens(features=np.ones((2, NUM_TOKENS, 4), np.float32))
    found = Clusters().torch(both.torch, count)
    assert found.places.tolist() == [list(range(count))] * 2
    # All that are no centre go to the first.
    assert found.sizes.tolist() == [[NUM_TOKENS - count + 1.0, *[1.0] * (count - 1)]] * 2


def test_steps_are_as_even_as_can_be() -> None:
    assert even_steps(576, 144, 4) == [468, 360, 252, 144]
    assert even_steps(16, 9, 3) == [14, 12, 9]
    assert even_steps(16, 16, 2) == [16, 16]


@pytest.mark.parametrize(
    ("merge", "count", "gone"),
    [(Bipartite(), 11, "13 of 24"), (Bipartite(rounds=2), 5, "10 of 15"), (Fuse(), 11, "13 of 24")],
)
def test_more_than_half_is_refused(merge: Merge, count: int, gone: str) -> None:
    merge.check(NUM_TOKENS, 12)
    with pytest.raises(Complaint) as error:
        merge.check(NUM_TOKENS, count)
    assert (error.value.message, error.value.hint) == (
        f"{gone} tokens would be merged at once, and half is the most that find a partner",
        "keep more tokens, or merge in more steps",
    )
