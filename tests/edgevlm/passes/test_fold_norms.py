"""fold_norms: matches, matches nothing, skips with reasons, keeps the outputs, leaves ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgevlm.device import load_device
from edgevlm.errors import PassError
from edgevlm.model.norms import LayerNorm, RmsNorm
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Context, FoldNorms, run_pass
from tests.edgevlm.tiny import drawn, native_spec, tiny_spec

SPECS = {
    "tied": tiny_spec(),
    "untied": tiny_spec(tied=False),
    "head norms": tiny_spec(head_norms=True),
    "no vision bias": tiny_spec(vision_bias=False),
    "native": native_spec((4, 6)),
}


def probe(model: Vlm) -> Tensor:
    """Logits of a prompt with a picture, all rows."""
    vision = model.spec.vision
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, *vision.pixels_shape(vision.grids[0]), generator=generator)
    with torch.no_grad():
        rows = model.encode(pixels)[0]
        ids = torch.tensor([5, 6, *[model.spec.image_token_id] * len(rows), 7, 8, 9])
        return model(model.embed(ids, rows), torch.arange(len(ids)))


def context() -> Context:
    return Context(device=load_device("host-cpu"), probe=probe)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_outputs_stay(spec: VlmSpec) -> None:
    model = drawn(spec)
    before = probe(model)
    assert before.std() > 0.5, "logits must be large enough to show a difference"
    run_pass(FoldNorms(), model, context())
    # float32 roundings in another order; 1e-4 is the bound of every lossless pass.
    torch.testing.assert_close(probe(model), before, rtol=0, atol=1e-4 * float(before.std()))


def test_matches() -> None:
    model = drawn(tiny_spec(tied=False))
    change = run_pass(FoldNorms(), model, context())
    assert change.sites == (
        "vision.layers.0.norm1",
        "vision.layers.0.attention.qkv",
        "vision.layers.0.norm2",
        "vision.layers.0.mlp.up",
        "vision.layers.1.norm1",
        "vision.layers.1.attention.qkv",
        "vision.layers.1.norm2",
        "vision.layers.1.mlp.up",
        "decoder.layers.0.norm1",
        "decoder.layers.0.attention.qkv",
        "decoder.layers.0.norm2",
        "decoder.layers.0.mlp.gate",
        "decoder.layers.0.mlp.up",
        "decoder.layers.1.norm1",
        "decoder.layers.1.attention.qkv",
        "decoder.layers.1.norm2",
        "decoder.layers.1.mlp.gate",
        "decoder.layers.1.mlp.up",
        "decoder.norm",
        "decoder.head",
    )
    assert change.measures == {"norms": 9}
    assert change.skipped == {
        "vision.pre_norm": "something other than a linear map of its own reads it"
    }


def test_skips_with_reasons() -> None:
    model = drawn(tiny_spec(vision_bias=False, head_norms=True))
    change = run_pass(FoldNorms(), model, context())
    assert change.skipped == {
        "vision.pre_norm": "something other than a linear map of its own reads it",
        "vision.layers.0.norm1": "its bias has no bias of vision.layers.0.attention.qkv to go to",
        "vision.layers.0.norm2": "its bias has no bias of vision.layers.0.mlp.up to go to",
        "vision.layers.1.norm1": "its bias has no bias of vision.layers.1.attention.qkv to go to",
        "vision.layers.1.norm2": "its bias has no bias of vision.layers.1.mlp.up to go to",
        "decoder.layers.0.attention.q_norm": "it scales each head alone, before rotation",
        "decoder.layers.0.attention.k_norm": "it scales each head alone, before rotation",
        "decoder.layers.1.attention.q_norm": "it scales each head alone, before rotation",
        "decoder.layers.1.attention.k_norm": "it scales each head alone, before rotation",
        "decoder.norm": "something other than a linear map of its own reads it",
    }


def test_matching_nothing_is_an_error() -> None:
    model = drawn(tiny_spec())
    run_pass(FoldNorms(), model, context())
    with pytest.raises(PassError) as caught:
        run_pass(FoldNorms(), model, context())
    assert str(caught.value) == (
        "fold_norms: matched nothing (its weight is one and its bias zero already; something "
        "other than a linear map of its own reads it)\n  hint: remove the pass from the recipe"
    )
    assert caught.value.exit_code == 2


def test_folded_norms_scale_no_more() -> None:
    """The invariant: one and zero at every folded norm, and the embedding as it was."""
    model = drawn(tiny_spec())
    embedding = model.embedding.weight.clone()
    change = run_pass(FoldNorms(), model, context())
    folded = [
        module
        for site, module in model.named_modules()
        if site in change.sites and isinstance(module, (RmsNorm, LayerNorm))
    ]
    assert len(folded) == change.measures["norms"] == 8
    for norm in folded:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        if isinstance(norm, LayerNorm):
            assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
    assert torch.equal(model.embedding.weight, embedding)
    assert model.decoder.head.weight is model.embedding.weight


def test_spec_stays() -> None:
    spec = tiny_spec()
    assert FoldNorms().foresee(spec, context()).spec is spec
