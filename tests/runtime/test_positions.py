"""Where rows stand: by hand, for offsets and spans of a bundle's own and of a graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.image import (
    FixedGeometry,
    ImageLayout,
    ImageSpec,
    NativeGeometry,
    TiledGeometry,
    prepare,
)
from edgevlm_runtime.positions import placed_positions
from edgevlm_runtime.text import TextSpec, encode_prompt
from tests.runtime.templates import SCENES, byte_level
from tests.runtime.toy import Array

QUARTERS = ((0.0,), (0.25,), (0.5,), (0.75,))
# Two words, four visual tokens, three words, four visual tokens, a word.
ROWS = np.array([2, 3, 4, 5, 9, 10, 11, 12])
PAIR = [ImageLayout(tokens=(4,))] * 2


def placed_like(**fields: object) -> tuple[Array, float]:
    """Positions of two pictures of four tokens among 14 rows."""
    layouts = [replace(layout, **fields) for layout in PAIR]  # type: ignore[arg-type]
    return placed_positions(14, ROWS, layouts, "sequential")


def test_text_and_pictures_count_on_without_more_ado() -> None:
    positions, after = placed_like()
    assert positions.dtype == np.int64
    assert positions.tolist() == list(range(14))
    assert (after, type(after)) == (14, int)


def test_a_stride_of_a_quarter() -> None:
    positions, after = placed_like(offsets=QUARTERS, span=1.0)
    assert positions.dtype == np.float64
    assert positions.tolist() == [0, 1, 2, 2.25, 2.5, 2.75, 3, 4, 5, 6, 6.25, 6.5, 6.75, 7]
    assert (after, type(after)) == (8, int)


def test_text_begins_where_the_span_ends() -> None:
    """It is not rounded up."""
    positions, after = placed_like(offsets=QUARTERS, span=0.75)
    first, second = [2, 2.25, 2.5, 2.75], [5.75, 6, 6.25, 6.5]
    assert positions.tolist() == [0, 1, *first, 2.75, 3.75, 4.75, *second, 6.5]
    assert after == 7.5


@pytest.mark.parametrize(
    ("offsets", "span", "first", "between", "second", "last"),
    [
        (((0.0,),) * 4, 1.0, [2, 2, 2, 2], [3, 4, 5], [6, 6, 6, 6], 7),  # all share one
        (((0.0,), (0.0,), (1.0,), (1.0,)), 2.0, [2, 2, 3, 3], [4, 5, 6], [7, 7, 8, 8], 9),  # rows
        (None, 6.0, [2, 3, 4, 5], [8, 9, 10], [11, 12, 13, 14], 17),  # a gap behind
        (QUARTERS[::-1], None, [2.75, 2.5, 2.25, 2], [6, 7, 8], [9.75, 9.5, 9.25, 9], 13),
    ],
)
def test_offsets_and_spans(
    offsets: tuple[tuple[float, ...], ...] | None,
    span: float | None,
    first: list[float],
    between: list[int],
    second: list[float],
    last: int,
) -> None:
    positions, after = placed_like(offsets=offsets, span=span)
    assert positions.tolist() == [0, 1, *first, *between, *second, last]
    assert positions.dtype == (np.int64 if offsets is None or span is not None else np.float64)
    assert (after, type(after)) == (last + 1, int)


def test_tiles_share_the_offsets_of_their_picture() -> None:
    layout = ImageLayout(tokens=(2, 2), tiles=(1, 1), offsets=((0.0,), (0.5,)), span=1.5)
    positions, after = placed_positions(7, np.array([1, 2, 4, 5]), [layout], "sequential")
    assert positions.tolist() == [0, 1, 1.5, 2.5, 3.5, 4, 5]
    assert after == 6


def test_three_axes() -> None:
    """Text stands at one number on all axes; offsets and spans take the place of the grid's."""
    rows = np.array([2, 3, 5, 6])
    by_rule = ImageLayout(tokens=(2,), token_grid=(1, 2))
    of_its_own = ImageLayout(
        tokens=(2,), token_grid=(1, 2), offsets=((0.0, 1.0, 0.5), (0.0, 1.0, 1.5)), span=1.5
    )
    positions, after = placed_positions(8, rows, [by_rule, of_its_own], "mrope")
    assert positions.tolist() == [
        [0, 1, 2, 2, 4, 5, 5, 6.5],
        [0, 1, 2, 2, 4, 6, 6, 6.5],
        [0, 1, 2, 3, 4, 5.5, 6.5, 6.5],
    ]
    assert after == 7.5
    positions, after = placed_positions(8, rows, [by_rule, by_rule], "mrope")
    assert positions.dtype == np.int64
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert after == 8


def test_offsets_that_depend_on_the_picture() -> None:
    """They take the place of the layout's; its span stays, and is as many as tokens without."""
    seen = [np.array([[0], [0], [2], [3]]), np.array([[1], [0.5], [0], [0]], np.float32)]
    layouts = [replace(PAIR[0], offsets=QUARTERS, span=2.5), PAIR[1]]
    positions, after = placed_positions(14, ROWS, layouts, "sequential", seen)
    assert positions.tolist() == [0, 1, 2, 2, 4, 5, 4.5, 5.5, 6.5, 8.5, 8, 7.5, 7.5, 11.5]
    assert after == 12.5


def test_offsets_of_other_shapes() -> None:
    cases = (
        (ImageLayout(tokens=(2,), offsets=((0.0,),)), "sequential", [1, 1], [2, 1]),
        (ImageLayout(tokens=(2,), offsets=((0.0,), (1.0,)), span=2), "mrope", [2, 1], [2, 3]),
    )
    for layout, rule, given, wanted in cases:
        with pytest.raises(BundleError) as error:
            placed_positions(3, np.array([0, 1]), [layout], rule)
        assert str(error.value) == (
            f"offsets of 2 visual tokens have the shape {given}, positions of the rule {rule!r} "
            f"take {wanted}\n  hint: compile the bundle again"
        )


def test_a_rotary_embedding_of_more_axes_than_the_rule() -> None:
    """Text and whole grids have the same on all that stand for one; a graph tells them apart."""
    rows, grid = np.array([2, 3, 5, 6]), ImageLayout(tokens=(2,), token_grid=(1, 2))
    plain, after = placed_positions(8, rows, [grid, grid], "mrope")
    wide, last = placed_positions(8, rows, [grid, grid], "mrope", num_axes=6)
    assert (wide.dtype, last) == (np.int64, after)
    assert wide.tolist() == [plain[axis // 2].tolist() for axis in range(6)]
    line, flat = replace(PAIR[0], tokens=(2,)), ImageLayout(tokens=(2,), span=4.0)
    found, after = placed_positions(8, rows, [line, flat], "sequential", num_axes=3)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5, 6, 9]] * 3
    assert after == 10
    seen = [np.array([[0, 1, 3], [1, 0, 1]]), np.array([[2, 2, 2], [0, 1, 3]])]
    found, after = placed_positions(8, rows, [flat, flat], "sequential", seen, 3)
    assert found.tolist() == [
        [0, 1, 2, 3, 6, 9, 7, 11],
        [0, 1, 3, 2, 6, 9, 8, 11],
        [0, 1, 5, 3, 6, 9, 10, 11],
    ]
    assert after == 12


def test_axes_of_a_rule_are_as_many_each() -> None:
    for rule, num_axes, own in (("mrope", 4, 3), ("mrope", 1, 3)):
        with pytest.raises(BundleError) as error:
            placed_positions(1, np.empty(0, np.int64), [], rule, num_axes=num_axes)
        assert str(error.value) == (
            f"the rotary embedding turns with {num_axes} axes, which are not so many for each of "
            f"the {own} of the rule {rule!r}\n  hint: compile the bundle again"
        )


def test_tokens_fewer_than_their_grid_stand_as_text_does() -> None:
    """Where they have a span; those of a whole grid are spread over it."""
    few = ImageLayout(tokens=(2,), token_grid=(2, 2), span=5.0)
    whole = ImageLayout(tokens=(2,), token_grid=(1, 2), span=5.0)
    positions, after = placed_positions(6, np.array([1, 2, 3, 4]), [few, whole], "mrope")
    assert positions.tolist() == [
        [0, 1, 2, 6, 6, 11],
        [0, 1, 2, 6, 6, 11],
        [0, 1, 2, 6, 7, 11],
    ]
    assert after == 12
    with pytest.raises(BundleError) as error:
        placed_positions(2, np.array([0, 1]), [replace(few, span=None)], "mrope")
    assert str(error.value) == "a picture of 2 visual tokens has no grid of positions"


def test_three_axes_want_a_span_with_their_offsets() -> None:
    layout = ImageLayout(tokens=(1,), token_grid=(1, 1), offsets=((0.0, 0.0, 0.0),))
    with pytest.raises(BundleError) as error:
        placed_positions(2, np.array([0]), [layout], "mrope")
    assert str(error.value) == (
        "a picture of 1 visual tokens has offsets and no span of positions\n"
        "  hint: compile the bundle again"
    )


@pytest.mark.parametrize(
    ("geometry", "size", "index", "num_groups"),
    [
        (FixedGeometry(size=(8, 8)), (20, 10), 0, 1),
        (TiledGeometry(longest_edge=64, tile=32), (64, 32), 0, 3),
        (
            NativeGeometry(
                patch=2,
                merge=1,
                temporal_patch=1,
                min_pixels=4,
                max_pixels=400,
                grids=((4, 4), (2, 6)),
            ),
            (12, 4),
            1,
            1,
        ),
    ],
)
def test_a_layout_has_the_offsets_of_its_grid(
    geometry: FixedGeometry | TiledGeometry | NativeGeometry,
    size: tuple[int, int],
    index: int,
    num_groups: int,
) -> None:
    offsets = (((0.0,), (0.5,)), ((0.0,), (0.25,), (0.5,)))
    num_kinds = 2 if isinstance(geometry, NativeGeometry) else 1
    spec = ImageSpec(
        geometry=geometry,
        resample="nearest",
        rescale=None,
        mean=None,
        std=None,
        tokens=(2, 3)[:num_kinds],
        offsets=offsets[:num_kinds],
        spans=(1.0, 2.0)[:num_kinds],
    )
    picture = Image.new("RGB", size)
    layout = prepare(picture, spec).layout
    assert layout.tokens == ((2, 3)[index],) * num_groups
    assert (layout.offsets, layout.span) == (offsets[index], (1.0, 2.0)[index])
    plain = prepare(picture, replace(spec, offsets=None, spans=None)).layout
    assert plain == replace(layout, offsets=None, span=None)


def test_a_prompt_of_fractions() -> None:
    tokenizer = byte_level()
    spec = TextSpec(
        chat_template=SCENES,
        special={},
        image_token="<image>",
        image_token_id=tokenizer.token_to_id("<image>"),
    )
    layout = ImageLayout(tokens=(4,), offsets=QUARTERS, span=1.0)
    prompt = encode_prompt("ab", [layout], spec, tokenizer)
    assert prompt.positions.tolist() == [0, 1, 1.25, 1.5, 1.75, 2, 3, 4]
    assert prompt.next_position == 5
