"""The tokens of a plan: segments and their state, prompts of tiles and of grids, and shares."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgevlm.checkpoint import open_checkpoint
from edgevlm.decisions import Decision
from edgevlm.device import load_device
from edgevlm.families.image_spec import ImageChoices
from edgevlm.model.spec import VlmSpec
from edgevlm.plan import Plan, make_plan
from edgevlm.recipe import parse_recipe
from edgevlm.reduce.cost import prefill_macs, vision_macs
from edgevlm.sizes import parameters
from edgevlm.tokens import SegmentPlan
from edgevlm_runtime.images.spec import ImageSpec, TiledGeometry
from tests.edgevlm.tiny import native_spec, tiny_spec

MINIMAL = "model: owner/name\ndevice: host-cpu\ncontext: {capacity: 160}\n"
CUTS = """passes:
  - reduce:
      stages:
        - {at: projector, keep: 12, select: spread}
        - {at: decoder, layer: 1, keep: 5, score: text_attention, select: top, place: PLACE}
"""


def planned(
    passes: str = "", spec: VlmSpec | None = None, text_rows: int | None = None, head: str = MINIMAL
) -> Plan:
    recipe = parse_recipe(head + passes)
    return make_plan(recipe, load_device("host-cpu"), spec or tiny_spec(), text_rows)


@pytest.mark.parametrize("place", ["keep", "repack"])
def test_segments(place: str) -> None:
    """Packed at the projector: what is kept behind it are the packed positions."""
    plan = planned(CUTS.replace("PLACE", place))
    assert plan.tokens.layers == (12, 5)
    assert plan.tokens.average == 8.5
    assert plan.tokens.segments == (
        SegmentPlan(
            first=0,
            end=1,
            tokens=12,
            kept=12,
            rows=76,
            positions="packed",
            group="main",
            capacity=160,
        ),
        SegmentPlan(
            first=1,
            end=2,
            tokens=5,
            kept=5,
            rows=69,
            positions="packed",
            group="from_1",
            capacity=153,
        ),
    )
    for variant in plan.variants:
        assert [(group.name, group.capacity) for group in variant.state] == [
            ("main", 160),
            ("from_1", 153),
        ]


@pytest.mark.parametrize(("place", "positions"), [("keep", "kept"), ("repack", "packed")])
def test_positions_of_a_cut_alone(place: str, positions: str) -> None:
    cut = f"{{at: decoder, layer: 1, keep: 5, score: text_attention, select: top, place: {place}}}"
    plan = planned(f"passes: [{{reduce: {{stages: [{cut}]}}}}]\n")
    assert [part.positions for part in plan.tokens.segments] == ["kept", positions]


@pytest.mark.parametrize(("place", "positions"), [("keep", "kept"), ("repack", "packed")])
def test_positions_of_a_stage_before_the_decoder(place: str, positions: str) -> None:
    stage = f"{{at: projector, keep: 5, select: uniform, place: {place}}}"
    plan = planned(f"passes: [{{reduce: {{stages: [{stage}]}}}}]\n")
    assert [part.positions for part in plan.tokens.segments] == [positions]


def test_shares_are_of_the_whole_model() -> None:
    plan, whole = planned(CUTS.replace("PLACE", "keep")), planned()
    tokens = plan.tokens
    assert tokens.dense == whole.tokens.cost
    assert tokens.percent == {
        "average_tokens": 100 * 8.5 / 16,
        "vision": 100.0,
        "projector": 100.0,
        "prefill": 100 * tokens.cost.prefill / whole.tokens.cost.prefill,
        "total": 100 * tokens.cost.total / whole.tokens.cost.total,
        "kv": 100 * (76 + 69) / 160,
    }
    assert whole.tokens.percent is None
    assert whole.tokens.dense is None
    assert whole.tokens.cost.choosing == 0


def test_what_comes_after_is_no_gain_of_reduction() -> None:
    """A cache of eight bits has a quarter of the bytes, reduced or not."""
    cuts = CUTS.replace("PLACE", "keep")
    float_cache, int8 = planned(cuts), planned(f"{cuts}  - quantize: {{kv: int8}}\n")
    assert 4 * int8.tokens.cost.kv_bytes == float_cache.tokens.cost.kv_bytes
    assert int8.tokens.percent == float_cache.tokens.percent


def test_rows_of_text() -> None:
    """The option before the recipe, and 64 where neither says."""
    in_recipe = MINIMAL.replace("capacity: 160", "capacity: 160, text_rows: 99")
    assert planned().tokens.text_rows == 64
    assert planned(head=in_recipe).tokens.text_rows == 99
    assert planned(head=in_recipe, text_rows=0).tokens.text_rows == 0
    plan = planned(head=in_recipe)
    assert plan.tokens.cost.prefill == prefill_macs(plan.spec.decoder, [16 + 99] * 2)


def test_a_tiled_picture() -> None:
    """Nine tiles and the whole picture, with 2 marks each, 3 ends of rows and 2 around all."""
    geometry = TiledGeometry(longest_edge=96, tile=32)
    image = ImageSpec.from_json(tiny_spec().image)
    spec = dataclasses.replace(
        tiny_spec(), image=dataclasses.replace(image, geometry=geometry).to_json()
    )
    tokens = planned(CUTS.replace("PLACE", "keep"), spec, text_rows=7).tokens
    marks = 10 * 2 + 3 + 2
    assert tokens.largest_picture == 10 * 12 + marks
    assert (tokens.priced.groups, tokens.priced.text_rows) == (10, marks + 7)
    assert [part.rows for part in tokens.segments] == [120 + marks + 7, 50 + marks + 7]
    assert tokens.cost.vision == 10 * vision_macs(spec, (4, 4))


def test_the_picture_of_the_most_tokens() -> None:
    tokens = planned(spec=native_spec((4, 6), (8, 4))).tokens
    assert tokens.priced.grid == (8, 4)
    assert tokens.layers == (8, 8)
    assert [(part.tokens, part.rows) for part in tokens.segments] == [(8, 72)]


def test_state_of_several_pictures_in_fixed_shapes() -> None:
    """One graph for each number of pictures that the context holds, each of its own name."""
    cut = "{at: decoder, layer: 1, keep: 5, score: text_attention, select: top}"
    passes = f"targets: [static]\npasses: [{{reduce: {{pictures: 4, stages: [{cut}]}}}}]\n"
    told: dict[int, list[Decision]] = {}

    def graphs(capacity: int) -> list[tuple[str, int | None, int | None]]:
        plan = planned(passes, head=MINIMAL.replace("160", str(capacity)))
        told[capacity] = [item for item in plan.decisions if "pictures in" in item.asked]
        (variant,) = plan.variants
        pictures = [graph for graph in variant.graphs if graph.phases == ("picture",)]
        return [(graph.name, graph.rows, graph.num_images) for graph in pictures]

    assert graphs(250) == [
        ("picture_1_128", 128, 1),
        ("picture_2_128", 128, 2),
        ("picture_3_160", 160, 3),
        ("picture_4_160", 160, 4),
    ]
    assert graphs(48) == [("picture_1_48", 48, 1), ("picture_2_48", 48, 2)]
    assert told == {
        250: [],
        48: [
            Decision(
                asked="prompts of up to 4 pictures in fixed shapes",
                outcome="degraded",
                reason="a context of 48 rows has no room for 4 of 16 tokens",
                effect="a prompt has at most 2",
            )
        ],
    }


@pytest.mark.parametrize(
    ("name", "width", "layers", "heads", "vocabulary", "hidden", "tied", "millions"),
    [
        ("llava-1.5-7b-shape", 4096, 32, (32, 32, 128), 32064, 11008, False, 6476 + 2 * 131),
        ("clip-l-362m-shape", 960, 32, (15, 5, 64), 49152, 2560, True, 362),
    ],
)
def test_shapes_of_published_models(
    name: str,
    width: int,
    layers: int,
    heads: tuple[int, int, int],
    vocabulary: int,
    hidden: int,
    tied: bool,
    millions: int,
) -> None:
    """CLIP ViT-L/14 at 336, of which the last layer but one speaks, and the decoder behind it."""
    folder = Path(__file__).parents[2] / "recipes" / "models" / name
    checkpoint = open_checkpoint(str(folder), None)
    assert checkpoint.seed == 0
    spec = checkpoint.spec(ImageChoices())
    vision, decoder = spec.vision, spec.decoder
    assert (vision.width, vision.patch_size, vision.grids) == (1024, 14, ((24, 24),))
    assert (len(vision.layers), vision.feature_layers) == (23, (23,))
    assert vision.layers[0].attention.num_heads == 16
    assert vision.layers[0].mlp.width == 4096
    assert vision.class_token
    assert spec.image_tokens((24, 24)) == 576
    assert (decoder.width, len(decoder.layers), decoder.vocab_size) == (width, layers, vocabulary)
    attention = decoder.layers[0].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == heads
    assert (decoder.layers[0].mlp.width, decoder.tied) == (hidden, tied)
    count = parameters(spec)
    assert round((count.embedding + count.layers + count.head) / 1e6) == pytest.approx(
        millions, abs=1
    )
