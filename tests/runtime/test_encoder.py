"""Graphs before the decoder: their order, their grids, and the rows they give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.encoder import Encoder
from edgevlm_runtime.engine import Engines, as_input
from edgevlm_runtime.errors import BundleError, InputError
from edgevlm_runtime.image import ImageLayout, PreparedImage
from edgevlm_runtime.manifest import GraphSpec, TensorSpec
from tests.runtime.bundles import variant_of, write_manifest
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.toy import Array

WIDTH = 4
QUESTION = np.arange(12, dtype=np.float32).reshape(3, WIDTH)


def opened(folder: Path, *graphs: GraphSpec) -> Encoder:
    bundle = Bundle.open(write_manifest(folder, {"static": variant_of("static", graphs, ())}))
    return Encoder(bundle, Engines(bundle))


def picture(
    value: float, grid: tuple[int, int] | None = None, num_tiles: int = 1, rows: int = 2
) -> PreparedImage:
    feeds = tuple(
        {"pixels": np.full((1, rows, WIDTH), value + tile, np.float32)} for tile in range(num_tiles)
    )
    return PreparedImage(feeds=feeds, layout=ImageLayout(tokens=(rows,) * num_tiles, grid=grid))


def plus_one(folder: Path, name: str, source: str, gives: str, rows: int | str = 2) -> GraphSpec:
    """Its input plus one."""
    graph = OnnxGraph(folder, name, "vision")
    shape = (1, rows, WIDTH)
    value = graph.input("x", "float32", shape, source)
    one = graph.const(np.array(1, np.float32))
    graph.output(graph.node("Add", value, one), gives, "float32", shape)
    return graph.finish()


def test_order_follows_from_what_feeds_what(tmp_path: Path) -> None:
    encoder = opened(
        tmp_path,
        plus_one(tmp_path, "last", "output:second", "image_embeds"),
        plus_one(tmp_path, "middle", "output:first", "second"),
        plus_one(tmp_path, "begin", "pixels", "first"),
    )
    outputs = encoder.run([picture(10, num_tiles=2), picture(20)], QUESTION)
    rows = np.repeat([13, 14, 23], 2)
    wanted = np.broadcast_to(rows[:, None], (6, WIDTH))
    np.testing.assert_array_equal(outputs["image_embeds"][0], wanted)
    np.testing.assert_array_equal(outputs["first"][0], wanted - 2)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ("Q", QUESTION + 1),
        (2, QUESTION[1:] + 1),
        (5, np.concatenate([np.zeros((2, WIDTH)), QUESTION]) + 1),
    ],
)
def test_question_rows_are_there_without_pictures(
    tmp_path: Path, rows: int | str, wanted: Array
) -> None:
    encoder = opened(tmp_path, plus_one(tmp_path, "ask", "question_embeds", "asked", rows))
    np.testing.assert_array_equal(encoder.run([], QUESTION)["asked"][0], wanted)


@pytest.mark.parametrize(("rows", "wanted"), [("Q", [0, 2, 3]), (2, [2, 3]), (5, [0, 0, 0, 2, 3])])
def test_weights_go_with_the_question_rows(
    tmp_path: Path, rows: int | str, wanted: list[float]
) -> None:
    """Of the kind that the graph names; rows of padding come first and weigh nothing."""
    graph = OnnxGraph(tmp_path, "ask", "question")
    weights = graph.input("x", "float32", (1, rows), "question_weights:words")
    graph.output(graph.node("Identity", weights), "weighed", "float32", (1, rows))
    encoder = opened(tmp_path, graph.finish())
    given = {"text": np.ones(3, np.float32), "words": np.array([0, 2, 3], np.float32)}
    assert encoder.run([], QUESTION, given)["weighed"].tolist() == [wanted]
    with pytest.raises(BundleError) as error:
        encoder.run([], QUESTION)
    assert str(error.value) == (
        "input 'x' of graph 'ask' has source 'question_weights:words', which is not there before "
        "the decoder runs\n  hint: compile the bundle again"
    )


def test_the_grid_chooses_the_graph(tmp_path: Path) -> None:
    graphs = []
    for grid in ((1, 2), (3, 1)):
        rows = grid[0] * grid[1]
        graph = OnnxGraph(tmp_path, f"vision_{grid[0]}x{grid[1]}", "vision")
        pixels = graph.input("pixels", "float32", (1, rows, WIDTH), "pixels")
        scale = graph.const(np.array(rows, np.float32))
        graph.output(graph.node("Mul", pixels, scale), "image_embeds", "float32", (1, rows, WIDTH))
        graphs.append(graph.finish(grid=grid))
    encoder = opened(tmp_path, *graphs)
    pictures = [picture(5, (3, 1), rows=3), picture(7, (1, 2), rows=2)]
    rows = encoder.run(pictures, QUESTION)["image_embeds"][0, :, 0]
    np.testing.assert_array_equal(rows, [15, 15, 15, 14, 14])
    with pytest.raises(InputError) as error:
        encoder.run([picture(1, (2, 2))], QUESTION)
    assert str(error.value) == (
        "no vision graph for a picture grid of (2, 2)\n  hint: the bundle has 1x2, 3x1"
    )


def test_graphs_of_all_grids_give_the_same(tmp_path: Path) -> None:
    graphs = []
    for grid, gives in (((1, 2), "image_embeds"), ((2, 1), "features")):
        graph = OnnxGraph(tmp_path, f"vision_{grid[0]}", "vision")
        pixels = graph.input("pixels", "float32", (1, 2, WIDTH), "pixels")
        graph.output(pixels, gives, "float32", (1, 2, WIDTH))
        graphs.append(graph.finish(grid=grid))
    with pytest.raises(BundleError) as error:
        opened(tmp_path, *graphs)
    assert str(error.value) == (
        "graphs for pictures of grid [1, 2] give ['image_embeds'], those of grid [2, 1] give "
        "['features']\n  hint: compile the bundle again"
    )


def test_what_comes_once_per_prompt_is_not_joined(tmp_path: Path) -> None:
    """Its shape is its own, here without rows."""
    graph = OnnxGraph(tmp_path, "ask", "question")
    rows = graph.input("x", "float32", (1, "Q", WIDTH), "question_embeds")
    graph.output(graph.node("ReduceSum", rows, keepdims=0), "asked", "float32", ())
    encoder = opened(tmp_path, graph.finish(), plus_one(tmp_path, "see", "pixels", "image_embeds"))
    outputs = encoder.run([picture(10), picture(20)], QUESTION)
    assert outputs["asked"] == QUESTION.sum()
    np.testing.assert_array_equal(outputs["image_embeds"][0, :, 0], [11, 11, 21, 21])


def test_patches_get_the_batch_axis_and_the_dtype_of_the_graph() -> None:
    tensor = TensorSpec(name="x", dtype="float16", shape=(1, 3, WIDTH))
    for given in (QUESTION, QUESTION[None], np.asfortranarray(QUESTION)):
        taken = as_input(given, tensor)
        assert (taken.dtype, taken.shape) == (np.float16, (1, 3, WIDTH))
        assert taken.flags.c_contiguous
        np.testing.assert_array_equal(taken[0], QUESTION)


def test_graphs_that_feed_each_other_in_a_circle(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as error:
        opened(
            tmp_path,
            plus_one(tmp_path, "one", "output:b", "a"),
            plus_one(tmp_path, "two", "output:a", "b"),
        )
    assert str(error.value) in (
        "graphs feed each other in a circle: one -> two -> one\n  hint: compile the bundle again",
        "graphs feed each other in a circle: two -> one -> two\n  hint: compile the bundle again",
    )


def test_a_source_that_is_not_there_yet(tmp_path: Path) -> None:
    encoder = opened(tmp_path, plus_one(tmp_path, "early", "rope_cos", "x_out"))
    with pytest.raises(BundleError) as error:
        encoder.run([], QUESTION)
    assert str(error.value) == (
        "input 'x' of graph 'early' has source 'rope_cos', which is not there before the decoder "
        "runs\n  hint: compile the bundle again"
    )
