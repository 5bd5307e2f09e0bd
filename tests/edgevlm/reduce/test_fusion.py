"""Text that sees pictures before the decoder (LLaVA-Mini's pre-fusion)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.device import load_device
from edgevlm.document import Complaint
from edgevlm.errors import PassError
from edgevlm.model.attention import Angles, FullCache
from edgevlm.model.fusion import Fusion
from edgevlm.model.graphs import vision_graph
from edgevlm.model.learned import learned_weights
from edgevlm.model.rope import rope_tables
from edgevlm.model.stages import Asking
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Context, Reduce, Rotate, run_pass
from edgevlm.reduce.fusion import FusionOptions
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from edgevlm_runtime.session import place_text
from tests.edgevlm.reduce.deep import deep_spec
from tests.edgevlm.reduce.models import llava_spec
from tests.edgevlm.tiny import drawn
from tests.export.running import run

# Rows of size three after two layers, in float32 and in another order.
TOLERANCE = 1e-5
RESAMPLED = {"at": "encoder", "keep": 4, "merge": {"resample": {"heads": 4}}}


def context() -> Context:
    return Context(device=load_device("host-cpu"), targets=("ort", "static"))


def step(**options: Any) -> Reduce:
    return Reduce.model_validate({"stages": (RESAMPLED,), "fusion": {"layers": 2}, **options})


def fusing(rows: int = 64) -> Vlm:
    model = drawn(llava_spec())
    run_pass(step(fusion={"layers": 2, "rows": rows}), model, context())
    return model


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(model: Vlm, x: Tensor) -> Tensor:
    """Rows through the layers of a fusion, as a decoder passes a whole sequence."""
    assert model.fusion is not None
    tables = rope_tables(model.spec.decoder.rope, torch.arange(x.shape[1]))
    for layer in model.fusion.layers:
        x = layer(x, FullCache(Angles(*tables)))
    return x


@pytest.mark.parametrize("num_text", [1, 5, 9])
def test_all_rows_pass_the_layers_as_a_sequence(num_text: int) -> None:
    """Of more text than is fused, the first rows stay."""
    model, width = fusing(rows=6), 64
    whole, left, text = (
        numbers(2, 16, width),
        numbers(2, 4, width, seed=1),
        numbers(1, num_text, width),
    )
    assert model.fusion is not None
    with torch.no_grad():
        found = model.fusion(whole, left, text, torch.ones(1, num_text))
        fused = text[:, -6:]
        wanted = by_hand(model, torch.cat([whole, left, fused.expand(2, -1, -1)], 1))
    torch.testing.assert_close(found.tokens, wanted[:, 16:20], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.text[:, -6:], wanted[:, 20:], atol=TOLERANCE, rtol=0)
    if num_text > 6:
        assert torch.equal(found.text[:, :3], text[:, :3].expand(2, -1, -1))
    assert (found.text[:, -1] - text[:, -1]).abs().max() > 0.1


def test_rows_that_fill_up_change_nothing() -> None:
    model, width = fusing(), 64
    whole, left, text = numbers(1, 16, width), numbers(1, 4, width, seed=1), numbers(1, 5, width)
    filled = torch.cat([torch.zeros(1, 7, width), text], 1)
    weights = torch.tensor([[0.0] * 7 + [1.0] * 5])
    assert model.fusion is not None
    with torch.no_grad():
        bare = model.fusion(whole, left, text, torch.ones(1, 5))
        found = model.fusion(whole, left, filled, weights)
    torch.testing.assert_close(found.tokens, bare.tokens, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.text[:, 7:], bare.text, atol=TOLERANCE, rtol=0)
    assert torch.equal(found.text[:, :7], torch.zeros(1, 7, width))


def test_layers_that_add_nothing_leave_text_and_tokens() -> None:
    model = fusing()
    assert model.fusion is not None
    for name, weight in model.fusion.named_parameters():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            weight.zero_()
    spec, text = model.spec, numbers(1, 5, 64)
    pixels = numbers(2, *spec.vision.pixels_shape((4, 4)))
    with torch.no_grad():
        found = model.visual(pixels, question=Asking(rows=text, weights={"text": torch.ones(1, 5)}))
        model.fusion = None
        plain = model.visual(pixels)
    assert torch.equal(found.features, plain.features)
    assert plain.text is None
    assert found.text is not None
    assert torch.equal(found.text, text.expand(2, -1, -1))


@pytest.mark.parametrize("target", ["ort", "static"])
def test_a_graph_gives_tokens_and_text(target: str) -> None:
    model = fusing(rows=8)
    made = vision_graph(model, num_images=1 if target == "static" else None)
    assert [tensor.name for tensor in made.plan.outputs] == ["image_embeds", "text_embeds"]
    graph = lower(capture(made.module, made.plan), TARGETS[target])
    pixels, text = numbers(1, *model.spec.vision.pixels_shape((4, 4))), numbers(1, 8, 64)
    weights = torch.tensor([[0.0] * 3 + [1.0] * 5])
    given = (pixels, text * weights[..., None], weights)
    with torch.no_grad():
        wanted = made.module(*given)
    feeds = {t.name: x.numpy() for t, x in zip(made.plan.inputs, given, strict=True)}
    found = run(graph, feeds, TARGETS[target].engine.options)
    for tensor, want in zip(made.plan.outputs, wanted, strict=True):
        assert float(want.std()) > 0.1
        np.testing.assert_allclose(found[tensor.name], want.numpy(), atol=2e-5, rtol=0)


def test_text_of_several_calls_is_their_mean() -> None:
    """In the places of the last rows of text, whatever stands between them."""
    embeds = np.zeros((7, 2), np.float32)
    is_text = np.array([True, False, True, True, False, False, True])
    fused = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    place_text(embeds, is_text, fused, 2)
    wanted = np.zeros((7, 2), np.float32)
    # Rows 0-2 of the first call, 3-5 of the second: their means lie three rows of two further.
    wanted[[2, 3, 6]] = np.array([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    np.testing.assert_array_equal(embeds, wanted)


def test_more_rows_than_there_is_text_fill_up_in_front() -> None:
    embeds = np.zeros((3, 1), np.float32)
    is_text = np.array([False, True, True])
    place_text(embeds, is_text, np.array([[[9.0], [9.0], [1.0], [2.0]]], np.float32), 1)
    np.testing.assert_array_equal(embeds, np.array([[0.0], [1.0], [2.0]]))


def test_what_the_fusion_learned_has_names() -> None:
    names = [name for name, _ in learned_weights(fusing())]
    assert "fusion.layers.1.attention.qkv.weight" in names
    assert "vision.reduce.0.learned.resample.queries" in names


def test_a_plan_says_what_is_fused() -> None:
    decisions = step().foresee(llava_spec(), context()).decisions
    found = {d.asked: (d.outcome, d.reason, d.effect) for d in decisions}
    assert found["fusion of text and pictures in 2 layers"] == (
        "degraded",
        "text comes in a fixed number of rows",
        "the last 64 rows of a prompt's text are fused, others stay",
    )
    assert found["what the fusion learned"] == (
        "degraded",
        "no weights are given",
        "it is as training begins with it; write weights: FILE.safetensors",
    )


CUT = {"at": "decoder", "layer": 1, "keep": 2, "score": "text_attention", "select": "top"}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "other positions": (
        {"positions": {"v2pe": {"step": 0.5}}},
        "fused rows count by one, and visual tokens have other positions",
        "remove positions and place: keep",
    ),
    "a cut behind it": (
        {"stages": (RESAMPLED, CUT)},
        "fused text has seen all visual tokens, and a stage within the decoder asks what it looks "
        "at",
        "put the stages before the decoder",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_place(case: tuple[dict[str, Any], str, str]) -> None:
    options, message, hint = case
    with pytest.raises(PassError) as error:
        step(**options).foresee(deep_spec(), context())
    assert (error.value.message, error.value.hint) == (f"reduce: {message}", hint)


def test_three_axes_are_not_fused() -> None:
    spec = llava_spec()
    decoder = replace(spec.decoder, rope=replace(spec.decoder.rope, sections=(4, 2, 2)))
    with pytest.raises(PassError) as error:
        step().foresee(replace(spec, decoder=decoder), context())
    assert error.value.message == (
        "reduce: fused rows stand on one axis, and visual tokens of this model on three"
    )
    assert error.value.hint == "remove fusion"


def test_fusion_needs_something_to_be_left() -> None:
    with pytest.raises(ValueError, match="text is fused with what stages leave") as error:
        Reduce.model_validate({"positions": {"share": "all"}, "fusion": {"layers": 1}})
    (found,) = (entry["ctx"]["error"] for entry in error.value.errors())
    assert isinstance(found, Complaint)
    assert found.message == "text is fused with what stages leave, and there are none"
    assert found.hint == "name a method or stages, or remove fusion"


def test_rows_that_a_fusion_reads_are_not_rotated() -> None:
    with pytest.raises(PassError) as error:
        Rotate().foresee(fusing().spec, context())
    assert str(error.value) == (
        "rotate: the fusion has learned to read rows that are not rotated\n"
        "  hint: leave decoder out of components"
    )


def test_a_fusion_begins_the_same_every_time() -> None:
    spec = fusing().spec
    first, second = (Fusion(spec, FusionOptions(layers=1)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(float(x.std()) > 0 for name, x in first.items() if x.dim() == 2)
