"""Pieces that learn: what they are before training, their weights in a file, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from edgevlm.device import load_device
from edgevlm.errors import PassError
from edgevlm.model.attention import AllRows
from edgevlm.model.learned import learned_weights
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm, place
from edgevlm.passes import Context, Reduce, run_pass
from edgevlm.reduce.apply import apply_stage
from edgevlm.reduce.extent import extent_of
from edgevlm.reduce.scorers.predictor import Predictor
from edgevlm.sizes import learned_bytes
from tests.edgevlm.reduce.deep import deep_spec
from tests.edgevlm.reduce.early import GRID, NUM_TOKENS, WIDTH, stage, taught, views
from tests.edgevlm.reduce.models import joining_spec, llava_spec, reduced
from tests.edgevlm.tiny import drawn, native_spec

# Rows of size three after two layers, in float32 and in another order.
TOLERANCE = 1e-5
REGISTERS = {"at": "encoder", "keep": 5, "merge": {"registers": {"heads": 4}}}
PREDICTED = {
    "at": "projector",
    "keep": 4,
    "score": {"predictor": {"width": 16}},
    "select": "top",
}


def pixels_of(spec: VlmSpec) -> Tensor:
    shape = spec.vision.pixels_shape(spec.vision.grids[0])
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


def context(folder: Path = Path()) -> Context:
    return Context(device=load_device("host-cpu"), targets=("ort",), folder=folder)


def step(*stages: Mapping[str, Any], **options: Any) -> Reduce:
    return Reduce.model_validate({"stages": stages, **options})


def noisy(model: Vlm) -> Vlm:
    """With learned weights that are not those training begins with."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in list(learned_weights(model)):
        noise = torch.randn(weight.shape, generator=generator)
        place(model, name, weight + 0.1 * noise)
    return model


def attention_by_hand(weights: Mapping[str, Tensor], layer: int, x: Tensor, heads: int) -> Tensor:
    """torch's own attention with the weights of a layer."""
    width = x.shape[-1]
    found, _ = torch.nn.functional.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3,
        width,
        heads,
        torch.cat([weights[f"layer{layer}_{part}"].T for part in "qkv"]),
        torch.cat([weights[f"layer{layer}_{part}_bias"] for part in "qkv"]),
        None,
        None,
        False,
        0.0,
        weights[f"layer{layer}_out"].T,
        weights[f"layer{layer}_out_bias"],
        training=False,
    )
    return found.transpose(0, 1)


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize("reattends", [True, False])
def test_registers_pass_the_encoder_by_hand(reattends: bool, has_class_token: bool) -> None:
    spec = llava_spec(class_token=has_class_token)
    written = {**REGISTERS, "merge": {"registers": {"heads": 4, "reatten": reattends}}}
    model = noisy(drawn(reduced(spec, written)))
    vision, pixels = model.vision, pixels_of(spec)
    weights = {name.split(".")[-1]: weight for name, weight in learned_weights(model)}
    with torch.no_grad():
        x = torch.cat([vision.embed(pixels), weights["rows"].expand(2, -1, -1)], 1)
        x = x if vision.pre_norm is None else vision.pre_norm(x)
        for index, layer in enumerate(vision.layers):
            given = layer.attention(layer.norm1(x), AllRows())
            if reattends:
                own = given[:, -5:]
                own = own + attention_by_hand(weights, index, own, 4)
                given = torch.cat([given[:, :-5], own], 1)
            x = x + given
            x = x + layer.mlp(layer.norm2(x))
        x = x if vision.norm is None else vision.norm(x)
        wanted = model.projector(x[:, -5:], (4, 4))
        found = model.encode(pixels)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
    assert wanted.std() > 0.1


def test_registers_begin_without_an_attention_of_their_own() -> None:
    pixels, found = pixels_of(llava_spec()), []
    for reattends in (True, False):
        model = drawn(llava_spec())
        written = {**REGISTERS, "merge": {"registers": {"reatten": reattends}}}
        model.stage(reduced(llava_spec(), written))
        with torch.no_grad():
            found.append(model.encode(pixels))
    assert torch.equal(*found)


def test_as_many_queries_as_tokens_and_sharp_attention_leave_the_tokens() -> None:
    """Queries that are the places of tokens find just these."""
    both = views("none")
    made = stage(NUM_TOKENS, merge={"resample": {"heads": 1}})
    view = taught(made, both).torch
    one, none = torch.eye(WIDTH), torch.zeros(WIDTH)
    weights = dict(view.learned["resample"])
    weights |= {f"attention_{part}": one for part in ("q", "k", "v", "out")}
    weights |= {f"attention_{part}_bias": none for part in ("q", "k", "v", "out")}
    # Queries are normed: all alike they are nothing, and only places ask.
    weights |= {"queries": torch.ones(NUM_TOKENS, WIDTH), "query_norm_shift": none}
    weights |= {"query_norm_scale": one[0] * 0, "key_norm_shift": none}
    weights["key_norm_scale"] = torch.full((WIDTH,), 1e-3)
    weights["attention_q"] = one * 2000.0
    found = apply_stage(made, replace(view, learned={"resample": weights}))
    features = view.tokens.features
    wanted = torch.nn.functional.layer_norm(features, (WIDTH,)) * 1e-3
    # Places differ by sines of one step, times 2000: softmax leaves nothing to others.
    torch.testing.assert_close(found.features, wanted, atol=1e-6, rtol=0)
    assert found.grid == GRID


def test_a_predictor_keeps_what_it_has_learned_to_keep() -> None:
    """A path of ones from one number of a token to its score."""
    both = views("none", seed=4)
    made = stage(6, score={"predictor": {"width": 8, "blocks": 0}}, select="top")
    view = taught(made, both).torch
    weights = {name: x * 0 for name, x in view.learned["predictor"].items()}
    weights["norm_scale"] = weights["norm_scale"] + 1.0
    for name in ("embed", "narrow", "narrower"):
        weights[name][0, 0] = 1.0
        weights[f"{name}_bias"][0] = 10.0
    weights["embed"][0, 0], weights["embed"][3, 0] = 0.0, 1.0
    weights["two"][0, 0] = 1.0
    found = apply_stage(made, replace(view, learned={"predictor": weights}))
    normed = torch.nn.functional.layer_norm(view.tokens.features, (WIDTH,))
    wanted = normed[0, :, 3].topk(6).indices.sort().values
    assert found.places[0].tolist() == wanted.tolist()


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    source = noisy(drawn(reduced(llava_spec(), REGISTERS, PREDICTED)))
    weights = dict(learned_weights(source))
    assert len(weights) == 1 + 2 * 8 + len(
        Predictor(width=16).weights(extent_of(source.spec, source.spec.reduction.stages[0][1][1]))
    )
    save_file({name: x.detach().clone() for name, x in weights.items()}, tmp_path / "w.safetensors")
    models = {}
    for given in ("w.safetensors", None):
        model = drawn(llava_spec())
        run_pass(step(REGISTERS, PREDICTED, weights=given), model, context(tmp_path))
        models[given] = model
    pixels = pixels_of(source.spec)
    with torch.no_grad():
        taught_one = models["w.safetensors"].encode(pixels)
        assert not torch.allclose(taught_one, models[None].encode(pixels))
        held = dict(learned_weights(models["w.safetensors"]))
        assert all(torch.equal(held[name], x) for name, x in weights.items())


def test_what_is_untrained_says_so() -> None:
    decisions = step(PREDICTED).foresee(llava_spec(), context()).decisions
    found = [(d.asked, d.outcome, d.reason, d.effect) for d in decisions if "learned" in d.asked]
    assert found == [
        (
            "stage 1, what predictor learned",
            "degraded",
            "no weights are given",
            "it is as training begins with it; write weights: FILE.safetensors",
        )
    ]


def files(folder: Path) -> dict[str, tuple[str | None, str]]:
    """Files that are no weights of a predictor: the complaint about each."""
    model = drawn(reduced(llava_spec(), PREDICTED))
    weights = {name: x.detach().clone() for name, x in learned_weights(model)}
    name = "reduce.0.learned.predictor.two_bias"
    fewer = {other: x for other, x in weights.items() if other != name}
    save_file(fewer, folder / "fewer.safetensors")
    save_file(
        {**weights, "reduce.0.learned.predictor.too": torch.ones(1)}, folder / "more.safetensors"
    )
    save_file({**weights, name: torch.ones(3)}, folder / "wider.safetensors")
    (folder / "no.safetensors").write_bytes(b"no tensors")
    whole = folder / "absent.safetensors"
    return {
        "fewer.safetensors": (
            f"fewer.safetensors lacks the tensor {name!r}",
            "save it by the names of the model",
        ),
        "more.safetensors": (
            "more.safetensors has the tensor 'reduce.0.learned.predictor.too', which no stage "
            "takes",
            "did you mean 'reduce.0.learned.predictor.two'?",
        ),
        "wider.safetensors": (
            f"{name!r} in wider.safetensors has shape [3], expected [2]",
            "train it for this model and these stages",
        ),
        "no.safetensors": (
            "no.safetensors is not a whole safetensors file: Error while deserializing header: "
            "header too large",
            "save it again",
        ),
        "absent.safetensors": (f"there is no file {str(whole)!r}", "give its path"),
    }


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    for name, (message, hint) in files(tmp_path).items():
        with pytest.raises(PassError) as error:
            step(PREDICTED, weights=name).foresee(llava_spec(), context(tmp_path))
        assert (error.value.message, error.value.hint) == (f"reduce: {message}", hint), name


def test_weights_of_what_learns_nothing(tmp_path: Path) -> None:
    with pytest.raises(PassError) as error:
        step({"at": "projector", "keep": 4, "select": "uniform"}, weights="w.safetensors").foresee(
            llava_spec(), context(tmp_path)
        )
    assert error.value.message == "reduce: no stage has learned anything"
    assert error.value.hint == "remove weights"


TURNING = replace(native_spec((4, 4)), projector=llava_spec().projector)
REFUSED: dict[str, tuple[VlmSpec, list[Mapping[str, Any]], str, str]] = {
    "registers in a turning encoder": (
        TURNING,
        [REGISTERS],
        "stage 1: patches of this encoder turn with their places in every layer, and registers "
        "have none",
        "choose another merge",
    ),
    "registers behind another stage": (
        llava_spec(),
        [{"at": "encoder.layers", "keep": 9, "merge": "bipartite"}, REGISTERS],
        "stage 2: registers leave in place of all patches, of which a stage before it took some",
        "put it first",
    ),
    "registers that are joined": (
        joining_spec(),
        [{**REGISTERS, "keep": 16}],
        "stage 1: the projector joins squares of 2 x 2 patches, which are gone when patches are "
        "taken at encoder",
        "put the stage at projector",
    ),
    "heads that do not fit": (
        llava_spec(),
        [{**REGISTERS, "merge": {"registers": {"heads": 7}}}],
        "stage 1: 7 heads do not share rows of 32 numbers evenly",
        "choose a number of heads that divides 32",
    ),
    "queries on no square": (
        llava_spec(),
        [{"at": "encoder", "keep": 5, "merge": "resample"}],
        "stage 1: learned queries lie on a square, and 5 tokens are none",
        "keep 4, or 9",
    ),
    "queries for tokens on no grid": (
        llava_spec(),
        [
            {"at": "encoder", "keep": 9, "select": "uniform"},
            {"at": "projector", "keep": 4, "merge": "resample"},
        ],
        "stage 2: 'resample' takes a whole grid, and the tokens lie on none",
        "put it before stages that select or merge",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_place(case: tuple[VlmSpec, list[Mapping[str, Any]], str, str]) -> None:
    spec, stages, message, hint = case
    with pytest.raises(PassError) as error:
        step(*stages).foresee(spec, context())
    assert (error.value.message, error.value.hint) == (f"reduce: {message}", hint)


def test_a_predictor_within_the_decoder_has_its_weights_there() -> None:
    """Whichever decoder reads the prompt, it is the same predictor."""
    cut = {"at": "decoder", "layer": 2, "keep": 9, "score": "predictor", "select": "top"}
    model = drawn(reduced(deep_spec(), cut))
    names = {name for name, _ in learned_weights(model)}
    assert "decoder.cuts.0.learned.predictor.embed" in names
    model.split_phases()
    ours = dict(learned_weights(model))
    twin = ours["prefill.cuts.0.learned.predictor.embed"]
    assert twin is ours["decoder.cuts.0.learned.predictor.embed"]
    assert twin.shape == (64, 512)


def test_a_plan_counts_what_stages_learned() -> None:
    """A predictor of a row of 64, and registers with an attention in each of two layers."""
    spec = reduced(llava_spec(), REGISTERS, PREDICTED)
    model = drawn(spec)
    numbers = sum(weight.numel() for _, weight in learned_weights(model))
    assert learned_bytes(spec) == 4 * numbers
    assert learned_bytes(llava_spec()) == 0
