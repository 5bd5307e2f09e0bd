"""Visual tokens that look at their own patches again (Vision Remember)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.device import load_device
from edgevlm.errors import PassError
from edgevlm.evidence.fed import visual_of
from edgevlm.model.graphs import vision_graph
from edgevlm.model.learned import learned_weights
from edgevlm.model.remember import Remember, by_windows
from edgevlm.model.spec import VlmSpec
from edgevlm.model.stages import Pictures
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Context, Reduce, run_pass
from edgevlm.sizes import learned_bytes
from tests.edgevlm.reduce.models import joining_spec, llava_spec
from tests.edgevlm.reduce.test_counted import deep_spec as counted_spec
from tests.edgevlm.reduce.test_counted import planned, products, written
from tests.edgevlm.tiny import drawn, native_spec

# Rows of size three after two layers, in float32 and in another order.
TOLERANCE = 1e-5
GRID = (4, 4)
POOLED = {"at": "projector", "keep": 4, "transform": "elastic"}


def context() -> Context:
    return Context(device=load_device("host-cpu"), targets=("ort", "static"))


def step(*stages: dict[str, Any], **options: Any) -> Reduce:
    asked = {"depths": (0.5, 1.0), "step": 1, "heads": 4, **options}
    return Reduce.model_validate({"stages": stages or (POOLED,), "remember": asked})


def looking(gate: float = 0.7, spec: VlmSpec | None = None, *stages: dict[str, Any]) -> Vlm:
    """A model whose tokens look again before each of its two layers."""
    model = drawn(llava_spec() if spec is None else spec)
    run_pass(step(*stages), model, context())
    for module in model.decoder.remembers.values():
        assert isinstance(module, Remember)
        module.gate.fill_(gate)
    return model


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Vlm, num_pictures: int = 2) -> Tensor:
    """Logits [T, V] of a prompt with pictures and text between them."""
    pixels = numbers(num_pictures, *model.spec.vision.pixels_shape(model.spec.vision.grids[0]))
    with torch.no_grad():
        visual = model.visual(pixels)
        count = visual.features.shape[1]
        ids, starts = [5], []
        for number in range(num_pictures):
            starts.append(len(ids))
            ids += [*[model.spec.image_token_id] * count, 6 + number]
        given = torch.tensor([*ids, 9, 10])
        pictures = Pictures(
            starts=torch.tensor(starts), last=torch.tensor([len(given) - 1]), fine=visual.fine
        )
        rows = model.embed(given, visual.features.flatten(0, 1))
        return model(rows, torch.arange(len(given)), None, pictures)[0]


def test_a_gate_of_zero_changes_nothing() -> None:
    plain = drawn(llava_spec())
    run_pass(Reduce.model_validate({"stages": (POOLED,)}), plain, context())
    assert torch.equal(logits(looking(0.0)), logits(plain))
    assert not torch.allclose(logits(looking()), logits(plain))


def by_hand(module: Remember, tokens: Tensor, features: Tensor, closed: Tensor) -> Tensor:
    """Attention of all tokens to all patches of a picture, closed [k, N] outside their windows."""
    normed = torch.nn.functional.layer_norm(
        tokens, tokens.shape[-1:], module.norm.weight, module.norm.bias, 1e-5
    )
    seen = torch.nn.functional.layer_norm(
        features,
        features.shape[-1:],
        module.feature_norm.weight,
        module.feature_norm.bias,
        1e-5,
    )
    q, k, v = module.q(normed), module.k(seen), module.v(seen)
    q, k, v = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (q, k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=closed)
    found: Tensor = tokens + module.gate * module.out(mixed.transpose(1, 2).flatten(2))
    return found


def test_a_token_sees_its_window_alone() -> None:
    """As dense cross-attention does whose mask is closed elsewhere."""
    module = looking().decoder.remembers["1"]
    assert isinstance(module, Remember)
    tokens, raster = numbers(2, 4, 64), numbers(2, 16, 64, seed=1)
    with torch.no_grad():
        found = module(tokens, by_windows(raster, GRID, (2, 2)))
        rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
        window = rows // 2 * 2 + columns // 2
        closed = torch.zeros(4, 16).masked_fill(
            window[None] != torch.arange(4)[:, None], -torch.inf
        )
        wanted = by_hand(module, tokens, raster, closed)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_features_are_those_of_the_layers_window_by_window() -> None:
    model = looking()
    pixels = numbers(2, *model.spec.vision.pixels_shape(GRID))
    with torch.no_grad():
        fine = model.visual(pixels).fine
        vision, kept = model.vision, []
        x = vision.pre_norm(vision.embed(pixels)) if vision.pre_norm else vision.embed(pixels)
        for layer in vision.layers:
            x = layer(x, vision._keys("attention", None))
            kept.append(x[:, 1:])
    assert fine is not None
    assert fine.shape == (2, 16, 64)
    # The second window of the picture begins at its third patch.
    raster = torch.cat(kept, -1)
    torch.testing.assert_close(fine[:, 4:8], raster[:, [2, 3, 6, 7]], atol=TOLERANCE, rtol=0)


def test_patches_that_are_joined_look_again_without_a_stage() -> None:
    model = drawn(joining_spec())
    whole = Reduce.model_validate({"remember": {"depths": (1.0,), "step": 2, "heads": 4}})
    run_pass(whole, model, context())
    (module,) = model.decoder.remembers.values()
    assert isinstance(module, Remember)
    assert module.patches == 4
    module.gate.fill_(1.0)
    assert logits(model).isfinite().all()


def test_text_and_later_rows_see_what_was_remembered() -> None:
    """Only rows of pictures change before the first layer, and all behind them after it."""
    with_it, without = logits(looking()), logits(looking(0.0))
    assert torch.equal(with_it[0], without[0])
    assert (with_it[1:] - without[1:]).abs().amax(-1).min() > 1e-3


def test_graphs_are_shown_the_features_of_every_picture() -> None:
    model = looking()
    made = vision_graph(model)
    assert [(x.name, x.shape) for x in made.plan.outputs] == [
        ("image_embeds", ("N", 4, 64)),
        ("image_features", ("N", 1, 16, 64)),
    ]
    pixels = numbers(2, *model.spec.vision.pixels_shape(GRID))
    with torch.no_grad():
        tokens, fine = made.module(pixels)
        visual = visual_of(model, [(model.visual(pixels[:1]), GRID)])
    assert visual is not None
    torch.testing.assert_close(visual.fine[0], fine[0, 0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(visual.rows[0], tokens[0], atol=TOLERANCE, rtol=0)


def test_what_was_learned_is_counted_and_has_names() -> None:
    model = looking()
    found = dict(learned_weights(model))
    assert "decoder.remembers.0.gate" in found
    assert learned_bytes(model.spec) == 4 * sum(x.numel() for x in found.values())
    model.split_phases()
    ours = dict(learned_weights(model))
    assert ours["prefill.remembers.1.q.weight"] is ours["decoder.remembers.1.q.weight"]


CUT = {"at": "decoder", "layer": 1, "keep": 2, "score": "text_attention", "select": "top"}
REFUSED: dict[str, tuple[VlmSpec, Reduce, str, str]] = {
    "tokens on no grid": (
        llava_spec(),
        step({"at": "projector", "keep": 5, "select": "uniform"}),
        "tokens look again at their own windows of patches, and they lie on no grid",
        "pool them: transform: elastic",
    ),
    "windows that differ": (
        llava_spec(),
        step({"at": "projector", "keep": 9, "transform": "elastic"}),
        "4 x 4 patches have no even windows for 3 x 3 tokens",
        "keep a number of tokens whose sides divide those of the grid",
    ),
    "patches that are gone": (
        llava_spec(),
        step({"at": "encoder.layers", "keep": 4, "layers": (0,), "transform": "windows"}),
        "tokens look again at all patches, of which a stage at encoder.layers took some",
        "put the stage at encoder or projector",
    ),
    "a cut behind it": (
        llava_spec(),
        step(POOLED, CUT),
        "tokens look again in layers that see all of them, and a stage in the decoder takes some",
        "put the stages before the decoder",
    ),
    "an encoder that turns": (
        replace(native_spec((4, 4)), projector=llava_spec().projector),
        step(POOLED),
        "patches of this encoder come in the order of its windows, and not row by row",
        "remove remember",
    ),
    "heads that do not fit": (
        llava_spec(),
        step(heads=7),
        "7 heads do not share rows of 64 numbers evenly",
        "choose a number of heads that divides 64",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_place(case: tuple[VlmSpec, Reduce, str, str]) -> None:
    spec, asked, message, hint = case
    with pytest.raises(PassError) as error:
        asked.foresee(spec, context())
    assert (error.value.message, error.value.hint) == (f"reduce: {message}", hint)


def test_by_windows_keeps_every_patch_once() -> None:
    order = by_windows(torch.arange(24.0).reshape(1, 24, 1), (4, 6), (2, 3)).flatten()
    assert order[:8].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]
    np.testing.assert_array_equal(np.sort(order.numpy()), np.arange(24))


def test_a_plan_counts_looking_again(tmp_path: Path) -> None:
    """The products of the exported graph that reads a prompt with a picture (I9)."""
    stages = "stages: [{at: projector, keep: 4, transform: elastic}]"
    remember = "remember: {depths: [0.34, 1.0], step: 2, heads: 4}"
    with_it, without = (
        planned(f"passes: [{{reduce: {{{asked}}}}}]\n", counted_spec())
        for asked in (f"{stages}, {remember}", stages)
    )
    graph = next(x for x in with_it.variants[0].graphs if x.phases == ("picture",))
    found = products(written(with_it, graph, tmp_path))
    ours = [product.macs for product in found if product.name.startswith("decoder.remembers.")]
    # Before layers 0, 2 and 4: queries, keys, values, their products, and the map behind.
    assert len(ours) == 3 * 6
    cost, plain = with_it.tokens.cost, without.tokens.cost
    assert cost.choosing - plain.choosing == sum(ours)
    assert cost.prefill == plain.prefill
