"""Every piece at the encoder and the projector against its twin by definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.reduce.piece import Choice, Merge, Rest, Scorer, Transform, known
from edgevlm.reduce.plan import Stage
from tests.edgevlm.reduce.early import GRID, KINDS, NUM_TOKENS, in_both, left_by, stage, views

# Features of size one, summed over 24 tokens in float32 and in float64.
TOLERANCE = 2e-5

CLASS = {"encoder_attention": {"by": "class", "instead": "all"}}
SELECTS: dict[str, dict[str, Any]] = {
    "class token": {"score": CLASS, "select": "top"},
    "all patches": {"score": {"encoder_attention": {"by": "all", "layer": -2}}, "select": "top"},
    "one head": {"score": {"encoder_attention": {"heads": "one", "by": "all"}}, "select": "top"},
    "random": {"score": {"random": {"seed": 3}}, "select": "top"},
    "lattice": {"score": CLASS, "select": {"top": {"lattice": 3}}},
    "uniform share": {"score": CLASS, "select": {"top": {"uniform_share": 0.4}}},
    "uniform": {"select": "uniform"},
    "spread": {"select": "spread"},
    "cover": {"at": "projector", "select": "cover"},
    "cover the text alone": {"at": "projector", "select": {"cover": {"query": "text", "alpha": 0}}},
    "dpp": {"at": "projector", "select": "dpp"},
    "dpp of words": {"at": "projector", "select": {"dpp": {"query": "words"}}},
    "facility": {"at": "projector", "select": "facility"},
    "relevant and diverse": {"score": CLASS, "select": {"relevant_diverse": {"key": 3}}},
}
PREDICTS: dict[str, dict[str, Any]] = {
    "predictor": {"score": {"predictor": {"width": 32, "heads": 4}}, "select": "top"},
    "predictor of the question": {
        "at": "projector",
        "score": {"predictor": {"width": 16, "blocks": 1, "query": "question"}},
        "select": "top",
    },
}
RESTS: dict[str, dict[str, Any]] = {
    "anchors": {"score": CLASS, "select": "top", "rest": {"anchors": {"share": 0.4}}},
    "pool of anchors": {
        "score": CLASS,
        "select": "top",
        "rest": {"anchors": {"share": 0.4, "pool": 3, "layer": -2}},
    },
    "average": {"score": CLASS, "select": "top", "rest": {"anchors": {"average": True}}},
    "neighbours": {"score": CLASS, "select": "top", "rest": {"neighbours": {"count": 4}}},
    "recycle": {"score": CLASS, "select": "top", "rest": {"recycle": {"per_cluster": 2}}},
    "all neighbours": {"score": CLASS, "select": "top", "rest": {"neighbours": {"count": 99}}},
}
MERGES: dict[str, dict[str, Any]] = {
    "bipartite": {"merge": "bipartite"},
    "bipartite by features": {"merge": {"bipartite": {"metric": "features"}}},
    "rounds": {"merge": {"bipartite": {"rounds": 3}}},
    "rounds by features": {"merge": {"bipartite": {"rounds": 3, "metric": "features"}}},
    "clusters": {"merge": "clusters"},
    "small clusters": {"merge": {"clusters": {"neighbours": 2}}},
}
AGGREGATES: dict[str, dict[str, Any]] = {
    "resample": {"merge": {"resample": {"heads": 5}}},
    "registers": {"merge": {"registers": {"heads": 5}}},
}
FUSES: dict[str, dict[str, Any]] = {
    "fuse": {"at": "encoder.layers", "merge": "fuse"},
    "fuse one way": {"at": "encoder.layers", "merge": {"fuse": {"both_ways": False}}},
    "fuse by some rows": {"at": "encoder.layers", "merge": {"fuse": {"every": 4, "size": 2}}},
    "in layers": {"at": "encoder.layers", "merge": "bipartite"},
}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "avgpool": {"transform": "avgpool"},
    "elastic": {"transform": "elastic"},
    "fourier": {"transform": "fourier"},
    "orthonormal": {"transform": {"fourier": {"preserve_mean": False}}},
    "windows": {"at": "encoder.layers", "transform": "windows"},
}
PIECES = {**SELECTS, **PREDICTS, **RESTS, **MERGES, **AGGREGATES, **FUSES, **TRANSFORMS}
CASES = [
    pytest.param(written, kind, id=f"{name}, {kind}")
    for name, written in PIECES.items()
    for kind in (KINDS[:2] if written.get("at") == "encoder.layers" else KINDS)
]


def stages_of(written: dict[str, Any]) -> list[Stage]:
    """The stage in a few sizes that it can have."""
    counts = [1, 4, 9, 17] if written.get("select") else [12, 17]
    if written in AGGREGATES.values():
        counts = [1, 4, 9, 16]
    if "rest" in written:
        counts = [2, 9, 20]
    if "transform" in written:
        counts = [6]
    if written.get("select") == {"top": {"lattice": 3}}:
        counts = [4, 9]
    return [stage(count, **written) for count in counts]


def test_every_piece_is_here() -> None:
    pieces = {piece.name for made in PIECES.values() for piece in stages_of(made)[0].pieces}
    families = (Scorer, Choice, Rest, Merge, Transform)
    early = {"encoder.layers", "encoder", "projector"}
    assert pieces == {
        name
        for family in families
        for name, kind in known(family).items()
        if early & set(kind.sites) and kind.__module__.startswith("edgevlm.")
    }


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("written", "kind"), CASES)
def test_torch_equals_the_twin(written: dict[str, Any], kind: str, batch: int) -> None:
    for made in stages_of(written):
        found, wanted = in_both(made, views(kind, batch, seed=made.count_out))
        np.testing.assert_array_equal(found.places.numpy(), wanted.places)
        np.testing.assert_allclose(found.features.numpy(), wanted.features, atol=TOLERANCE, rtol=0)
        assert found.features.shape[1] == made.count_out
        assert found.places.dtype == torch.int64
        assert found.grid == wanted.grid == made.grid_out
        if wanted.sizes is None:
            assert found.sizes is None
        else:
            assert found.sizes is not None
            np.testing.assert_allclose(found.sizes.numpy(), wanted.sizes, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("written", MERGES.values(), ids=MERGES.keys())
def test_merged_tokens_merge_again(written: dict[str, Any], batch: int) -> None:
    drawn = np.random.default_rng(batch)
    sizes = drawn.integers(1, 5, (batch, NUM_TOKENS)).astype(np.float32)
    places = np.sort(drawn.permuted(np.tile(np.arange(60), (batch, 1)), axis=1)[:, :NUM_TOKENS])
    both = views("none", batch).tokens(sizes=sizes, places=places, grid=None)
    for made in stages_of(written):
        found, wanted = in_both(made, both)
        np.testing.assert_array_equal(found.places.numpy(), wanted.places)
        np.testing.assert_allclose(found.features.numpy(), wanted.features, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(found.sizes.numpy(), wanted.sizes, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "written",
    [*SELECTS.values(), *PREDICTS.values(), *RESTS.values()],
    ids=[*SELECTS.keys(), *PREDICTS.keys(), *RESTS.keys()],
)
def test_a_selector_that_keeps_all_changes_no_bit(written: dict[str, Any]) -> None:
    for batch in (1, 2):
        both = views("none", batch)
        found = left_by(stage(NUM_TOKENS, **written), both)
        assert np.array_equal(found.features, both.numpy.tokens.features)
        assert np.array_equal(found.places, both.numpy.tokens.places)
        assert found.grid == GRID


CHANGING = {**MERGES, **FUSES, **TRANSFORMS}


@pytest.mark.parametrize("written", CHANGING.values(), ids=CHANGING.keys())
def test_what_merges_or_maps_and_keeps_all_is_the_identity(written: dict[str, Any]) -> None:
    for batch in (1, 2):
        both = views("none", batch)
        found = left_by(stage(NUM_TOKENS, **written), both)
        order = found.places.argsort(1)
        np.testing.assert_array_equal(np.sort(found.places), both.numpy.tokens.places)
        features = np.take_along_axis(found.features, order[..., None], 1)
        # Products with one and sums with zero, in float32.
        np.testing.assert_allclose(features, both.numpy.tokens.features, atol=1e-6, rtol=0)
        if written.get("at") != "encoder.layers":
            assert np.array_equal(order, both.numpy.tokens.places)
            assert found.grid == GRID


@pytest.mark.parametrize("written", [*SELECTS.values(), *MERGES.values()])
def test_tokens_leave_in_the_order_of_their_places(written: dict[str, Any]) -> None:
    for made in stages_of(written):
        found = left_by(made, views("none", 2, seed=7))
        assert (np.diff(found.places) > 0).all()


@pytest.mark.parametrize("name", ["class token", "all patches", "one head", "uniform share"])
def test_equal_scores_keep_the_lowest_rows(name: str) -> None:
    both = views("none", 2)
    for view in (both.torch, both.numpy):
        for probe in view.probes.values():
            # Attention is even where queries say nothing.
            probe.q[...] = 0.0
    found, wanted = in_both(stage(6, **SELECTS[name]), both)
    np.testing.assert_array_equal(found.places.numpy(), wanted.places)
    first = [0, 1, 2, 3, 4, 5]
    if name == "uniform share":
        # Two of six are the middles of halves of the grid, and four are the first of the others.
        first = [0, 1, 2, 3, 13, 16]
    assert found.places.tolist() == [first, first]


@pytest.mark.parametrize("name", ["spread", "cover", "dpp", "facility"])
def test_equal_tokens_keep_the_lowest_rows(name: str) -> None:
    both = views("none", 2)
    # Of exact cosines: every token is the same unit vector.
    for view in (both.torch, both.numpy):
        for array in (view.tokens.features, view.encoded):
            array[...] = 0.0
            array[..., 0] = 2.0
    found, wanted = in_both(stage(5, **SELECTS[name]), both)
    assert found.places.tolist() == wanted.places.tolist() == [[0, 1, 2, 3, 4]] * 2
