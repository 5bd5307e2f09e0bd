"""Ways of tokens through stages, and places of members, against lists of who came from where."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.errors import ModelError
from edgevlm.model.stages import token_offsets
from edgevlm.reduce.apply import apply_stage, numpy_apply_stage
from edgevlm.reduce.choices.top import Top
from edgevlm.reduce.members import followed, member_places, numpy_followed, way_of_rows
from edgevlm.reduce.merges.bipartite import Bipartite
from edgevlm.reduce.merges.clusters import Clusters
from edgevlm.reduce.merges.fuse import Fuse
from edgevlm.reduce.order import in_order, numpy_in_order
from edgevlm.reduce.piece import Merge, StaticClass
from edgevlm.reduce.plan import Stage
from edgevlm.reduce.rests.anchors import Anchors
from edgevlm.reduce.rests.neighbours import Neighbours
from edgevlm.reduce.rests.recycle import Recycle
from edgevlm.reduce.scorers.random import Random
from edgevlm.reduce.seq import Probe, VisSeq
from edgevlm.reduce.view import View
from tests.edgevlm.reduce.placing import (
    asked,
    foreseen,
    llava_spec,
    qwen_model,
    reduced,
    walked,
)
from tests.edgevlm.reduce.test_positions import positions_of
from tests.edgevlm.tiny import drawn

PPE = {"ppe": {"axes": 4}}


class Turned(Merge):
    """A merge of nothing that gives tokens in another order: all clusters have one member."""

    name: ClassVar[str] = "turned"
    static_class: ClassVar[StaticClass] = "S1"

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """Backwards."""
        tokens = view.tokens
        assert tokens.provenance is not None
        back = torch.arange(tokens.features.shape[1]).flip(0)
        return VisSeq(
            features=tokens.features[:, back],
            places=tokens.places[:, back],
            provenance=back.expand(len(tokens.features), -1),
        )

    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """Not asked here."""
        return view.tokens


class Mute(Turned):
    """A merge that does not say where tokens went."""

    name: ClassVar[str] = "mute"

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """The same without a way."""
        return replace(super().torch(view, count), provenance=None)


def stage(count_in: int, count_out: int, **pieces: Any) -> Stage:
    return Stage(
        at=pieces.pop("at", "projector"),
        layer=None,
        count_in=count_in,
        count_out=count_out,
        grid_in=None,
        grid_out=None,
        place="repack",
        **pieces,
    )


def raster(count: int, *, groups: int = 3, seed: int = 0) -> tuple[VisSeq[Any], VisSeq[Any]]:
    """Tokens nothing has been done to, for torch and for the twins."""
    features = np.random.default_rng(seed).standard_normal((groups, count, 5))
    places = np.tile(np.arange(count), (groups, 1))
    theirs = VisSeq(features=features, places=places, provenance=places)
    ours = VisSeq(
        features=torch.from_numpy(features.astype(np.float32)),
        places=torch.from_numpy(places),
        provenance=torch.from_numpy(places),
    )
    return ours, theirs


def members(way: np.ndarray, count: int) -> list[list[int]]:
    """The tokens that went to each of those left, in raster order."""
    return [[place for place, to in enumerate(way) if to == number] for number in range(count)]


@pytest.mark.parametrize("num_places", [1, 2, 4, 7])
def test_places_walk_back_from_the_last_member_and_round_again(num_places: int) -> None:
    """Clusters of 1, 2 and 4 members, and tokens that are in none."""
    way = np.array([[2, 0, -1, 2, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2, 2, -1]])
    found = member_places(torch.from_numpy(way), 3, num_places)
    assert found.dtype == torch.int64
    for group, places in enumerate(found.tolist()):
        for cluster, given in zip(members(way[group], 3), places, strict=True):
            back = cluster[::-1]
            assert given == [back[place % len(back)] for place in range(num_places)]


@pytest.mark.parametrize("seed", range(5))
def test_ways_follow_one_another(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.integers(-1, 9, (4, 20)), random.integers(-1, 5, (4, 9))
    wanted = [
        [-1 if to < 0 else int(onward[to]) for to in way]
        for way, onward in zip(first, second, strict=True)
    ]
    ours = followed(torch.from_numpy(first), torch.from_numpy(second))
    assert ours.tolist() == numpy_followed(first, second).tolist() == wanted


def test_tokens_that_are_kept_go_to_their_row() -> None:
    assert way_of_rows(torch.tensor([[1, 3], [0, 1]]), 4).tolist() == [
        [-1, 0, -1, 1],
        [0, 1, -1, -1],
    ]


@pytest.mark.parametrize(
    "piece",
    [
        Bipartite(metric="features"),
        Bipartite(metric="features", rounds=3),
        Clusters(),
        Clusters(neighbours=2),
    ],
)
def test_a_merge_says_where_tokens_went(piece: Merge) -> None:
    """What a token leaves as is the mean of those that went to it; two stages in turn."""
    ours, theirs = raster(13)
    first = ours.features
    for count_in, count_out in ((13, 8), (8, 5)):
        merge = stage(count_in, count_out, merge=piece)
        ours = apply_stage(merge, View(tokens=ours))
        theirs = numpy_apply_stage(merge, View(tokens=theirs))
    assert ours.provenance is not None
    np.testing.assert_array_equal(ours.provenance.numpy(), theirs.provenance)
    np.testing.assert_array_equal(ours.places.numpy(), theirs.places)
    assert (np.diff(theirs.places) > 0).all()
    for group in range(3):
        clusters = members(theirs.provenance[group], 5)
        assert sorted(itertools.chain(*clusters)) == list(range(13))
        # A pair stands where its first token stood, a cluster where its centre did.
        for place, cluster in zip(theirs.places[group].tolist(), clusters, strict=True):
            assert place in cluster
            assert isinstance(piece, Clusters) or place == min(cluster)
        assert ours.sizes is not None
        assert ours.sizes[group].tolist() == [len(cluster) for cluster in clusters]
        means = torch.stack([first[group, cluster].mean(0) for cluster in clusters])
        # Means of means in float32.
        torch.testing.assert_close(ours.features[group], means, atol=1e-5, rtol=0)


def views(count: int, seed: int) -> tuple[View[Any], View[Any]]:
    """Tokens with keys of a layer, for torch and for the twins."""
    ours, theirs = raster(count, seed=seed)
    keys = np.random.default_rng(9).standard_normal((3, count, 6))
    tensor = torch.from_numpy(keys.astype(np.float32))
    found = []
    for tokens, k in ((ours, tensor), (theirs, keys)):
        probe = Probe(q=k, k=k, num_heads=2, num_kv_heads=2, scale=1.0)
        found.append(View(tokens=tokens, probes={-1: probe, "own": probe}))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("rest", "extra", "came", "gone"),
    [
        (Anchors(share=0.34), 2, 12, 0),
        (Anchors(share=0.34, pool=3), 2, 6, 6),
        (Neighbours(count=3), 1, 12, 0),
        (Recycle(share=0.5, per_cluster=5), 2, 7, 5),
    ],
)
def test_the_rest_says_what_came_to_it(rest: Any, extra: int, came: int, gone: int) -> None:
    """A chosen token goes alone, others to what is made of them, and some nowhere."""
    ours, theirs = views(16, seed=2)
    select = stage(
        16, 4 + extra, score=Random(), select=Top(), rest=rest, extra=extra, at="encoder"
    )
    mine, twin = apply_stage(select, ours), numpy_apply_stage(select, theirs)
    assert mine.provenance is not None
    np.testing.assert_array_equal(mine.provenance.numpy(), twin.provenance)
    for group in range(3):
        clusters = members(twin.provenance[group], 4 + extra)
        assert [len(cluster) for cluster in clusters[:4]] == [1] * 4
        assert sum(map(len, clusters[4:])) == came
        np.testing.assert_array_equal(twin.sizes[group], [len(cluster) for cluster in clusters])
        assert (twin.provenance[group] < 0).sum() == gone
        for place, cluster in zip(twin.places[group], clusters, strict=True):
            assert place in cluster


@pytest.mark.parametrize("both_ways", [True, False])
def test_what_goes_both_ways_is_followed(both_ways: bool) -> None:
    ours, theirs = views(15, seed=6)
    fuse = stage(15, 9, merge=Fuse(both_ways=both_ways), at="encoder.layers")
    mine, twin = apply_stage(fuse, ours), numpy_apply_stage(fuse, theirs)
    assert mine.provenance is not None
    np.testing.assert_array_equal(mine.provenance.numpy(), twin.provenance)
    for group in range(3):
        clusters = members(twin.provenance[group], 9)
        assert sorted(itertools.chain(*clusters)) == list(range(15))
        assert [len(cluster) for cluster in clusters] == twin.sizes[group].tolist()
        assert [min(cluster) for cluster in clusters] == twin.places[group].tolist()


def test_tokens_come_back_in_order_with_all_they_have() -> None:
    random = np.random.default_rng(4)
    places = np.array([random.permutation(40)[:9] for _ in range(3)])
    tokens = VisSeq(
        features=random.standard_normal((3, 9, 2)).astype(np.float32),
        places=places,
        sizes=random.integers(1, 9, (3, 9)).astype(np.float32),
        provenance=random.integers(-1, 9, (3, 20)),
    )
    twin = numpy_in_order(tokens)
    ours = in_order(
        VisSeq(
            features=torch.from_numpy(tokens.features),
            places=torch.from_numpy(places),
            sizes=torch.from_numpy(tokens.sizes),
            provenance=torch.from_numpy(tokens.provenance),
        )
    )
    for name in ("features", "places", "sizes", "provenance"):
        np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(twin, name))
    for group in range(3):
        order = sorted(range(9), key=lambda row: places[group, row])
        assert twin.places[group].tolist() == places[group, order].tolist()
        for place, to in enumerate(tokens.provenance[group]):
            assert twin.provenance[group, place] == (-1 if to < 0 else order.index(to))


def test_nobody_is_followed_where_nobody_asks() -> None:
    ours, _ = raster(8)
    for pieces in (
        {"merge": Bipartite(metric="features")},
        {"merge": Clusters()},
        {"score": Random(), "select": Top()},
    ):
        plain = View(tokens=replace(ours, provenance=None))
        assert apply_stage(stage(8, 5, **pieces), plain).provenance is None


@pytest.mark.parametrize("left", [7, 8])
def test_a_merge_that_is_mute_is_refused(left: int) -> None:
    """Even one that merges nothing: it might have put tokens in another order."""
    ours, _ = raster(8)
    with pytest.raises(ModelError) as error:
        apply_stage(stage(8, left, merge=Mute()), View(tokens=ours))
    assert str(error.value) == (
        "'mute' does not say where tokens went, and positions of several places ask\n"
        "  hint: choose another merge, or remove ppe"
    )


@pytest.mark.parametrize("grid", [(4, 4), (8, 12)])
def test_clusters_of_one_stand_where_tokens_stood(grid: tuple[int, int]) -> None:
    """Exactly, on every axis, whatever order a merge gives them in."""
    if grid == (4, 4):
        model, wanted = drawn(llava_spec()), np.repeat(np.arange(16.0)[:, None], 4, axis=1)
    else:
        model = qwen_model(grid)
        places = np.arange(24.0)
        wanted = np.repeat(np.stack([places * 0, places // 6, places % 6], 1), 2, axis=1)
    axes = 4 if grid == (4, 4) else 2
    merge = {"at": "projector", "keep": 1.0, "merge": "bipartite"}
    dense = asked(model.spec, (84, 56), (84, 56), turns=2)
    reduced(model, stages=[merge], positions={"ppe": {"axes": axes}})
    count = len(wanted)
    question = asked(model.spec, (84, 56), (84, 56), turns=2)
    found = positions_of(model, question)
    plain = np.atleast_2d(dense.prompt.positions)
    np.testing.assert_array_equal(found, np.repeat(plain, axes, axis=0))
    np.testing.assert_array_equal(question.prompt.positions, found)
    assert question.prompt.next_position == dense.prompt.next_position
    # The same where a merge turns them round.
    tokens, _ = raster(count, groups=2)
    turned = in_order(Turned().torch(View(tokens=tokens), count))
    offsets = token_offsets(model.spec, grid, turned)
    np.testing.assert_array_equal(offsets.numpy(), np.stack([wanted] * 2))


@pytest.mark.parametrize("grid", [(4, 4), (8, 12)])
@pytest.mark.parametrize("turns", [1, 2])
def test_merged_tokens_stand_where_their_members_stood(grid: tuple[int, int], turns: int) -> None:
    """By hand from who went where, for prompts of several pictures in one turn and in two."""
    is_flat = grid == (4, 4)
    model = drawn(llava_spec()) if is_flat else qwen_model(grid)
    axes, columns, span = (4, 1, 16) if is_flat else (2, 6, 6)
    merge = {"at": "projector", "keep": 0.6, "merge": "bipartite"}
    reduced(model, stages=[merge], positions={"ppe": {"axes": axes}})
    spec = model.spec
    question = asked(spec, (84, 56), (84, 56), turns=turns)
    places = []
    for image in question.images:
        pixels = torch.from_numpy(image.feeds[0]["pixels"])
        tokens = model.visual(pixels if is_flat else pixels[None], grid)
        assert tokens.provenance is not None
        clusters = members(tokens.provenance[0].numpy(), tokens.features.shape[1])
        assert max(map(len, clusters)) > 1
        rows = []
        for cluster in clusters:
            chosen = [cluster[::-1][place % len(cluster)] for place in range(axes)]
            if is_flat:
                rows.append(chosen)
            else:
                down, across = [p // columns for p in chosen], [p % columns for p in chosen]
                rows.append([*[0] * axes, *down, *across])
        places.append(rows)
    wanted, after = walked(question, places, [span, span], spec.decoder.rope.num_axes)
    found = positions_of(model, question, 2)
    np.testing.assert_array_equal(found[:, :-2], wanted)
    np.testing.assert_array_equal(found[:, -2:], [[after, after + 1]] * len(found))


def test_places_survive_a_stage_in_every_layer_and_one_behind() -> None:
    spec = replace(llava_spec(), vision=replace(llava_spec().vision, feature_layers=(2,)))
    model = drawn(spec)
    stages = [
        {"at": "encoder.layers", "keep": 10, "merge": "bipartite"},
        {"at": "projector", "keep": 6, "merge": {"bipartite": {"metric": "features"}}},
    ]
    reduced(model, stages=stages, positions=PPE)
    tokens = model.visual(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert tokens.provenance is not None
    assert tokens.sizes is not None
    for way, sizes, places in zip(
        tokens.provenance.numpy(), tokens.sizes.tolist(), tokens.places.tolist(), strict=True
    ):
        clusters = members(way, 6)
        assert sorted(itertools.chain(*clusters)) == list(range(16))
        assert [len(cluster) for cluster in clusters] == sizes
        assert [min(cluster) for cluster in clusters] == places


def test_the_decoder_turns_with_as_many_axes() -> None:
    stages = [{"at": "projector", "keep": 0.6, "merge": "bipartite"}]
    rope = foreseen(llava_spec(), stages=stages, positions=PPE).decoder.rope
    assert (rope.sections, rope.num_axes) == ((2,) * 4, 4)
    spec = foreseen(qwen_model((8, 12)).spec, stages=stages, positions={"ppe": {"axes": 2}})
    assert (spec.decoder.rope.sections, spec.rule_axes) == ((2, 2, 3, 3, 3, 3), 3)


def test_a_prompt_without_pictures_is_as_before() -> None:
    spec = foreseen(
        llava_spec(),
        stages=[{"at": "projector", "keep": 10, "merge": "bipartite"}],
        positions=PPE,
    )
    prompt = asked(spec).prompt
    assert prompt.positions.tolist() == [list(range(len(prompt.token_ids)))] * 4


def test_ppe_is_a_method() -> None:
    """A recipe may have another number of places."""
    spec = foreseen(llava_spec(), method="ppe", keep=0.5)
    assert (spec.rule_axes, spec.decoder.rope.num_axes, spec.image["tokens"]) == (1, 8, [8])
    other = foreseen(llava_spec(), method="ppe", keep=0.5, positions=PPE)
    assert other.decoder.rope.num_axes == 4
