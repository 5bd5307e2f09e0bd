"""Position policies: offsets and spans by hand, whole prompts walked row by row, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.document import Complaint
from edgevlm.evidence.fed import inputs_along, visual_of
from edgevlm.model.rope import rope_tables
from edgevlm.model.spec import ProjectorSpec, RopeSpec, VlmSpec
from edgevlm.model.stages import token_offsets
from edgevlm.reduce.positions import blocks
from edgevlm_runtime.image import FixedGeometry, ImageSpec
from edgevlm_runtime.rotary import RotaryTable
from tests.edgevlm.calibrated import context
from tests.edgevlm.reduce.placing import (
    GRIDS,
    PLACES,
    asked,
    foreseen,
    llava_spec,
    qwen_model,
    qwen_spec,
    reduced,
    reduction,
    walked,
)
from tests.edgevlm.tiny import drawn

UNIFORM = {"at": "projector", "keep": 4, "select": "uniform"}
# Of 4 x 4 tokens, and of 4 x 6 and 3 x 3, those that `uniform` keeps.
KEPT = {(4, 4): [5, 7, 13, 15], (8, 12): [7, 10, 19, 22], (6, 6): [0, 2, 6, 8]}


def on_grid(places: list[int], columns: int) -> list[list[float]]:
    return [[0.0, place // columns, place % columns] for place in places]


@pytest.mark.parametrize("step", [1.0, 0.5, 0.25, 0.3, 1 / 256])
def test_v2pe_counts_on_by_a_fraction(step: float) -> None:
    """Text before and after a picture of N tokens is ceil(N * step) + 1 apart."""
    spec = foreseen(llava_spec(), positions={"v2pe": {"step": step}})
    question = asked(spec, (32, 32), (32, 32))
    places = [[(number + 1) * step - 1] for number in range(16)]
    wanted, after = walked(question, [places] * 2, [math.ceil(16 * step)] * 2, 1)
    prompt = question.prompt
    np.testing.assert_allclose(prompt.positions, wanted[0], atol=1e-12, rtol=0)
    assert prompt.next_position == after
    first = prompt.picture_rows[0]
    assert prompt.positions[first] == prompt.positions[first - 1] + step
    apart = prompt.positions[first + 16] - prompt.positions[first - 1]
    assert apart == math.ceil(16 * step) + 1
    assert np.array_equal(prompt.positions, np.arange(len(prompt.token_ids))) == (step == 1.0)
    assert prompt.positions.dtype == (np.int64 if step == 1.0 else np.float64)


def test_v2pe_of_fewer_tokens() -> None:
    options = {"positions": {"v2pe": {"step": 0.5}}, "stages": [UNIFORM]}
    image = foreseen(llava_spec(), **options).image
    assert image["tokens"] == [4]
    assert (image["offsets"], image["spans"]) == ([[[-0.5], [0.0], [0.5], [1.0]]], [2.0])


@pytest.mark.parametrize(
    ("policy", "offsets", "span"),
    [
        ("row", [[float(place // 4)] for place in range(16)], 4.0),
        ("all", [[0.0]] * 16, 1.0),
    ],
)
def test_tokens_share_positions(policy: str, offsets: PLACES, span: float) -> None:
    spec = foreseen(llava_spec(), positions={"share": policy})
    assert (spec.image["offsets"], spec.image["spans"]) == ([offsets], [span])
    question = asked(spec, (32, 32), (32, 32), (32, 32), turns=2)
    wanted, after = walked(question, [offsets] * 3, [span] * 3, 1)
    np.testing.assert_array_equal(question.prompt.positions, wanted[0])
    assert question.prompt.next_position == after


def test_tokens_of_a_coarser_grid_share_the_positions_of_its_rows() -> None:
    stages = [{"at": "projector", "keep": 4, "transform": "avgpool"}]
    image = foreseen(llava_spec(), stages=stages, positions={"share": "row"}).image
    assert (image["offsets"], image["spans"]) == ([[[0.0], [0.0], [1.0], [1.0]]], [2.0])


def test_tokens_of_three_axes_share_the_one_of_their_row() -> None:
    image = foreseen(qwen_spec(), positions={"share": "row"}).image
    offsets = [[[0.0, place // 6, 0.0] for place in range(24)]]
    offsets.append([[0.0, place // 3, 0.0] for place in range(9)])
    assert (image["offsets"], image["spans"]) == (offsets, [4.0, 3.0])


@pytest.mark.parametrize("turns", [1, 2])
def test_three_axes_keep_places_on_the_grid(turns: int) -> None:
    """Where a recipe says nothing: pictures of two grids, in one turn and in two."""
    model = qwen_model()
    dense = asked(model.spec, (168, 112), (84, 84), (168, 112), turns=turns)
    grids = [GRIDS[0], GRIDS[1], GRIDS[0]]
    whole = [on_grid(list(range(h * w // 4)), w // 2) for h, w in grids]
    spans = [6.0, 3.0, 6.0]
    wanted, after = walked(dense, whole, spans, 3)
    np.testing.assert_array_equal(dense.prompt.positions, wanted)

    reduced(model, stages=[UNIFORM])
    assert model.spec.image["tokens"] == [4, 4]
    assert (model.spec.image["spans"], model.spec.image["offsets"]) == ([6.0, 3.0], None)
    question = asked(model.spec, (168, 112), (84, 84), (168, 112), turns=turns)
    places = [on_grid(KEPT[grid], grid[1] // 2) for grid in grids]
    wanted, last = walked(question, places, spans, 3)
    np.testing.assert_array_equal(positions_of(model, question), wanted)
    # What follows stands where it stood, whatever was taken away.
    assert question.prompt.next_position == last == after


def positions_of(model: Any, question: Any, answered: int = 0) -> np.ndarray:
    """Where the compiler's side puts a prompt's rows, from the pixels on."""
    with torch.no_grad():
        calls = []
        for image in question.images:
            grid = image.layout.grid or model.spec.vision.grids[0]
            pixels = torch.from_numpy(image.feeds[0]["pixels"])
            calls.append((model.visual(pixels if pixels.ndim == 4 else pixels[None], grid), grid))
        fed = inputs_along(model, question, visual_of(model, calls), [1] * (answered + 1))
    found: np.ndarray = fed.positions.numpy()
    return found


@pytest.mark.parametrize(
    ("keep", "transform", "centres"),
    [
        # 2 x 3 windows of 2 x 2, and 3 x 4 windows of an uneven grid
        (6, "avgpool", [[1, 1], [1, 3], [1, 5], [3, 1], [3, 3], [3, 5]]),
        (12, "elastic", [[row, column] for row in (0, 2, 3) for column in (0, 2, 3, 5)]),
    ],
)
def test_a_coarser_grid_stands_at_its_centres(
    keep: int, transform: str, centres: list[list[int]]
) -> None:
    """Known before any picture: the graph has nothing to say, and the manifest says it."""
    model = qwen_model(GRIDS[0])
    reduced(model, stages=[{"at": "projector", "keep": keep, "transform": transform}])
    spec = model.spec
    assert not spec.moves_positions(GRIDS[0])
    offsets = [[0.0, *map(float, centre)] for centre in centres]
    assert (spec.image["offsets"], spec.image["spans"]) == ([offsets], [6.0])
    question = asked(spec, (168, 112), (168, 112), turns=2)
    wanted, after = walked(question, [offsets] * 2, [6.0] * 2, 3)
    np.testing.assert_array_equal(question.prompt.positions, wanted)
    assert question.prompt.next_position == after
    # The tokens say the same of themselves.
    tokens = model.visual(torch.from_numpy(question.feeds[0]["pixels"])[None], GRIDS[0])
    np.testing.assert_array_equal(token_offsets(spec, GRIDS[0], tokens)[0].numpy(), offsets)
    answered = positions_of(model, question, 2)
    np.testing.assert_array_equal(answered[:, -2:], [[after, after + 1]] * 3)


def joining_spec() -> VlmSpec:
    """8 x 8 patches, of which squares of 2 x 2 are joined to 4 x 4 tokens."""
    spec = llava_spec()
    image = ImageSpec.from_json(spec.image)
    geometry = FixedGeometry(size=(64, 64))
    return replace(
        spec,
        vision=replace(spec.vision, grids=((8, 8),), class_token=False, drop_first_row=False),
        projector=ProjectorSpec(
            kind="pixel_shuffle", in_width=32, out_width=64, bias=False, merge=2
        ),
        image=replace(image, geometry=geometry).to_json(),
    )


def test_squares_of_a_coarser_grid_stand_at_their_centres() -> None:
    """By the manifest; and where some of them are chosen, by the graph."""
    pool = {"at": "encoder", "keep": 0.25, "transform": "avgpool"}
    late = {"at": "projector", "keep": 2, "transform": "elastic", "place": "keep"}
    spec = foreseen(joining_spec(), stages=[pool, late])
    assert (spec.image["tokens"], spec.image["spans"]) == ([2], [16.0])
    # Of 2 x 2 at 5, 7, 13 and 15 a row.
    assert spec.image["offsets"] == [[[13.0], [15.0]]]
    model = drawn(joining_spec())
    reduced(model, stages=[pool, {**UNIFORM, "keep": 2, "place": "keep"}])
    tokens = model.visual(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    found = token_offsets(model.spec, (8, 8), tokens)
    assert found.tolist() == [[[13.0], [15.0]]]


def test_three_axes_counted_anew_are_those_of_text() -> None:
    spec = foreseen(qwen_spec(), stages=[{**UNIFORM, "place": "repack"}])
    assert (spec.image.get("offsets"), spec.image["spans"]) == (None, [4.0, 4.0])
    question = asked(spec, (168, 112), (84, 84))
    wanted, after = walked(question, [[[n] * 3 for n in range(4)]] * 2, [4, 4], 3)
    np.testing.assert_array_equal(question.prompt.positions, wanted)
    assert question.prompt.next_position == after


def test_all_tokens_counted_anew_are_the_grid() -> None:
    spec = foreseen(qwen_spec(), stages=[{**UNIFORM, "keep": 1.0, "place": "repack"}])
    question, dense = (asked(s, (168, 112), (84, 84)) for s in (spec, qwen_spec()))
    np.testing.assert_array_equal(question.prompt.positions, dense.prompt.positions)
    assert question.prompt.next_position == dense.prompt.next_position


@pytest.mark.parametrize("step", [None, 0.5])
def test_one_axis_keeps_places_where_asked(step: float | None) -> None:
    """By the graph; with v2pe as fractions of what they were."""
    model = drawn(llava_spec())
    policy = {} if step is None else {"positions": {"v2pe": {"step": step}}}
    reduced(model, stages=[{**UNIFORM, "place": "keep"}], **policy)
    spec = model.spec
    assert spec.moves_positions((4, 4))
    stride = 1.0 if step is None else step
    assert spec.image["spans"] == [16 * stride]
    places = [[(place + 1) * stride - 1] for place in KEPT[4, 4]]
    question = asked(spec, (32, 32), (32, 32), turns=2)
    wanted, _ = walked(question, [places] * 2, [16 * stride] * 2, 1)
    np.testing.assert_array_equal(positions_of(model, question)[None], wanted)


def test_what_a_plain_reduction_says_of_pictures_is_their_number() -> None:
    before = llava_spec()
    after = foreseen(before, stages=[UNIFORM])
    assert after.image == {**before.image, "tokens": [4]}
    assert after.decoder == before.decoder


def test_positions_alone_leave_all_tokens() -> None:
    model = drawn(llava_spec())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model.encode(pixels)
    change = reduced(model, positions={"share": "all"})
    assert torch.equal(model.encode(pixels), before)
    assert change.sites == ("decoder",)
    assert change.measures == {"visual_tokens_before": 16, "visual_tokens": 16}
    found = reduction(positions={"share": "all"}).foresee(llava_spec(), context())
    assert found.effect == "16 visual tokens become 16 on average"
    decisions = [(d.asked, d.outcome, d.effect) for d in found.decisions]
    assert decisions == [("positions share", "applied", "a picture takes 1 positions")]


@pytest.mark.parametrize(
    ("sections", "frequencies", "axes", "wanted"),
    [
        ((), 32, 8, (4,) * 8),
        ((), 6, 1, (6,)),
        ((16, 24, 24), 64, 8, (2,) * 8 + (3,) * 16),
        ((2, 3, 3), 8, 1, (2, 3, 3)),
    ],
)
def test_blocks_of_frequencies(
    sections: tuple[int, ...], frequencies: int, axes: int, wanted: tuple[int, ...]
) -> None:
    assert blocks(sections, frequencies, axes) == wanted
    assert sum(wanted) == frequencies


def test_blocks_are_of_one_size() -> None:
    with pytest.raises(Complaint) as error:
        blocks((16, 24, 24), 64, 3)
    assert error.value.message == "16 and 24 and 24 rotary frequencies are not 3 blocks of one size"
    assert error.value.hint == "choose axes from 1, 2, 4, 8"


def test_tables_turn_block_by_block() -> None:
    """Torch and numpy, against angle by angle; equal places turn as one."""
    inv_freq = tuple(10000.0 ** (-i / 8) for i in range(8))
    rope = RopeSpec(inv_freq=inv_freq, sections=(2, 2, 2, 2))
    positions = np.random.default_rng(0).integers(0, 50, (4, 5))
    wanted = np.array(
        [[row[f // 2] * inv_freq[f] for f in range(8)] for row in positions.T.tolist()]
    )
    cos, sin = rope_tables(rope, torch.from_numpy(positions))
    # Angles up to 50 in float32.
    np.testing.assert_allclose(cos.numpy(), np.cos(wanted), atol=4e-6, rtol=0)
    np.testing.assert_allclose(sin.numpy(), np.sin(wanted), atol=4e-6, rtol=0)
    table = RotaryTable(rope, 60)
    ours = np.empty((5, 8), np.float32), np.empty((5, 8), np.float32)
    table.fill(positions.T.astype(np.float64), *ours)
    np.testing.assert_allclose(ours[0], np.cos(wanted), atol=4e-6, rtol=0)
    one = np.tile(np.arange(5.0)[:, None], 4)
    plain = RotaryTable(RopeSpec(inv_freq=inv_freq), 60)
    same = np.empty((5, 8), np.float32), np.empty((5, 8), np.float32)
    table.fill(one, *ours)
    plain.fill(one[:, :1], *same)
    np.testing.assert_array_equal(ours, same)


def test_old_bundles_say_nothing_new() -> None:
    image = ImageSpec.from_json(llava_spec().image)
    assert (image.offsets, image.spans) == (None, None)
