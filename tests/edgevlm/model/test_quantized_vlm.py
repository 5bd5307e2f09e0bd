"""A model of quantized maps: built from a spec, tied, split into phases, run along an answer."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgevlm.model.graphs import delta_step, inplace_step
from edgevlm.model.quantized import QuantEmbedding, QuantLinear
from edgevlm.model.vlm import Vlm
from tests.edgevlm.calibrated import quantized, samples_of
from tests.edgevlm.tiny import drawn, native_spec, tiny_spec

PHASES = {"decoder": "w4a16", "prefill": "w8a8", "head": "w8a16"}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "phases": (PHASES, ("ort",)),
    "asymmetric": ({"vision": {"scheme": "w8a8", "symmetric": False}}, ("ort",)),
    "static": ({"vision": "w8a8", "decoder": "w16a16", "head": "w8a16"}, ("static",)),
    "float8": ({"vision": "fp8", "projector": "fp8", "kv": "float8_e4m3fn"}, ("static",)),
    "cache and table": (
        {"kv": "int4", "embedding": "int4", "head": "w4a16", "prefill": "w8a8"},
        ("ort",),
    ),
    "skipped in one phase": (
        {**PHASES, "sites": ({"match": "prefill.layers.1.mlp.*", "skip": "so"},)},
        ("ort",),
    ),
    "skipped in both": (
        {**PHASES, "sites": ({"match": "*.layers.1.mlp.*", "skip": "so"},)},
        ("ort",),
    ),
}


def named(model: Vlm) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (weight.dtype, weight.shape) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_spec_builds_the_module_that_the_pass_makes(case: str, tied: bool) -> None:
    """The same weights by the same names, of the same types and sizes, and shared alike."""
    options, targets = CASES[case]
    model = drawn(tiny_spec(tied=tied))
    quantized(model, options, targets=targets)
    built = Vlm(model.spec)
    assert named(built) == named(model)
    assert sharing(built) == sharing(model)
    kinds = [
        {name: type(part) for name, part in each.named_modules(remove_duplicate=False)}
        for each in (built, model)
    ]
    assert kinds[0] == kinds[1]
    assert {
        site: module.scheme
        for site, module in built.named_modules()
        if isinstance(module, QuantLinear)
    } == model.spec.schemes


def sharing(model: Vlm) -> set[frozenset[str]]:
    """Names of weights that are one."""
    owners: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), set()).add(name)
    return {frozenset(names) for names in owners.values() if len(names) > 1}


def test_prompts_share_what_is_not_quantized() -> None:
    model = drawn(tiny_spec())
    quantized(model, PHASES)
    shared = {name for names in sharing(model) for name in names if name.startswith("prefill.")}
    norms = {f"prefill.layers.{index}.norm{number}.weight" for index in (0, 1) for number in (1, 2)}
    head = {f"prefill.head.{name}" for name in ("weight", "scale")}
    assert shared == {*norms, "prefill.norm.weight", *head}
    assert model.prefill is not None
    assert model.prefill.head is model.decoder.head


def test_maps_that_stay_float_in_both_phases_are_one() -> None:
    options, targets = CASES["skipped in both"]
    model = drawn(tiny_spec())
    quantized(model, options, targets=targets)
    assert model.prefill is not None
    for name in ("gate", "up", "down"):
        site = f"layers.1.mlp.{name}.weight"
        assert model.prefill.get_parameter(site) is model.decoder.get_parameter(site)
    own = model.prefill.layers[0].get_submodule("mlp.up")
    assert isinstance(own, QuantLinear)


def test_a_split_model_computes_the_same() -> None:
    plain, split = drawn(tiny_spec()), drawn(tiny_spec())
    split.split_phases()
    assert len(list(split.parameters())) == len(list(plain.parameters()))
    rows = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(split(rows, torch.arange(12)), plain(rows, torch.arange(12)))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kv", [None, "int8"])
def test_an_answer_after_a_prompt_is_the_whole_sequence_where_weights_are_equal(
    native: bool, kv: str | None
) -> None:
    """Two decoders of the same maps: the prompt by one, the rows after it by the other."""
    spec = native_spec((4, 6)) if native else tiny_spec()
    model = drawn(spec)
    quantized(model, {"decoder": "w4a16", "prefill": "w4a16", "head": "w8a16", "kv": kv})
    rows = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20)
    with torch.no_grad():
        whole = model(rows, positions)[0]
        for length in (1, 7, 19, 20):
            answer = model.answer(rows, positions, length)
            assert answer.shape == (20 - length + 1, 96)
            # Sums over keys in another order, of logits of size 3.
            torch.testing.assert_close(answer, whole[length - 1 :], atol=3e-5, rtol=0)


def test_an_answer_is_the_prompt_by_one_decoder_and_the_rest_by_the_other() -> None:
    """Against a cache kept here: keys and values that each decoder's maps give for its rows."""
    model = drawn(tiny_spec())
    quantized(model, PHASES)
    assert model.prefill is not None
    rows = torch.randn(1, 11, 64, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(11)
    with torch.no_grad():
        answer = model.answer(rows, positions, 8)
        prompt = model.whole(model.prefill, rows[:, :8], positions[:8])[0]
        # The same sums over another number of rows.
        torch.testing.assert_close(answer[:1], prompt[-1:], atol=2e-5, rtol=0)
        alone = model.whole(model.decoder, rows, positions)[0]
        assert float((answer - alone[7:]).abs().max()) > 1e-2
        # Rows after the prompt follow from its cache alone, one by one as together.
        for count in (1, 2, 3):
            part = model.answer(rows[:, : 8 + count], positions[: 8 + count], 8)
            torch.testing.assert_close(part, answer[: count + 1], atol=2e-5, rtol=0)


def test_a_prompt_is_read_with_its_own_weights_and_tokens_with_theirs() -> None:
    model = drawn(tiny_spec())
    quantized(model, PHASES)
    calls: list[tuple[str, int]] = []
    for name in ("prefill", "decoder"):
        module = model.get_submodule(f"{name}.layers.0.attention.qkv")
        module.register_forward_pre_hook(
            lambda _module, inputs, name=name: calls.append((name, inputs[0].shape[1]))
        )
    rows = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(3))
    found = list(islice(model.greedy(rows, torch.arange(9)), 4))
    assert calls == [("prefill", 9), ("decoder", 1), ("decoder", 1), ("decoder", 1)]
    calls.clear()
    tokens = [token for token, _ in found]
    with torch.no_grad():
        fed = model.embedding(torch.tensor(tokens[:-1]))[None]
        logits = model.answer(torch.cat([rows, fed], 1), torch.arange(12), 9)
    assert calls == [("prefill", 9), ("decoder", 3)]
    assert [int(token) for token in logits.argmax(dim=1)] == tokens
    torch.testing.assert_close(torch.stack([x for _, x in found]), logits, atol=2e-5, rtol=0)


def test_graphs_have_the_weights_of_their_phase() -> None:
    model = drawn(tiny_spec())
    quantized(model, PHASES)
    for made, expected in (
        (inplace_step(model, 32, ("prefill",)), model.prefill),
        (inplace_step(model, 32, ("decode", "verify")), model.decoder),
        (inplace_step(model, 32), model.decoder),
        (delta_step(model, 32, 16, ("prefill",)), model.prefill),
        (delta_step(model, 32, 1, ("decode", "verify")), model.decoder),
    ):
        assert made.module.get_submodule("decoder") is expected


def test_a_model_without_weights_of_prompts_has_one_decoder() -> None:
    model = drawn(tiny_spec())
    quantized(model, {"decoder": "w4a16"})
    assert model.prefill is None
    assert inplace_step(model, 32, ("prefill",)).module.get_submodule("decoder") is model.decoder


def test_a_row_does_not_see_its_neighbours() -> None:
    """Scales of a row are its own: a loud row elsewhere in the prompt changes no other's maps."""
    model = drawn(tiny_spec())
    quantized(model, {"decoder": "w8a8"})
    module = model.decoder.layers[0].get_submodule("mlp.up")
    quiet = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4))
    loud = quiet.clone()
    loud[0, 2:] *= 100
    with torch.no_grad():
        assert torch.equal(module(loud)[0, :2], module(quiet)[0, :2])


def test_float_weights_are_what_is_multiplied() -> None:
    model = drawn(tiny_spec())
    quantized(model, {"decoder": {"scheme": "w4a16", "symmetric": False}, "vision": "w8a16"})
    for site in model.spec.schemes:
        module = model.get_submodule(site)
        assert isinstance(module, QuantLinear)
        weight: Tensor = module.float_weight()
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            want = nn.functional.linear(x.double(), weight.double())
            want += 0 if module.bias is None else module.bias.double()
            torch.testing.assert_close(module(x).double(), want, atol=1e-5, rtol=0)


def test_rows_of_a_table() -> None:
    model = drawn(tiny_spec())
    quantized(model, {"embedding": {"dtype": "int8", "group_size": 16}})
    table = model.embedding
    assert isinstance(table, QuantEmbedding)
    want = table.weight.float().view(96, 4, 16) * table.scale[..., None]
    ids = torch.tensor([[0, 95, 7], [7, 7, 1]])
    assert torch.equal(table(ids), want.view(96, 64)[ids])
    plain = drawn(tiny_spec()).embedding.weight.detach()
    # Half a step of the widest group.
    assert float((want.view(96, 64) - plain).abs().max()) <= 0.5 * float(table.scale.max()) + 1e-7


def test_calibration_leaves_no_hooks() -> None:
    model = drawn(tiny_spec())
    options = {"vision": {"scheme": "w8a8", "activations": "static"}, "decoder": "w4a16"}
    quantized(model, options, samples_of(model.spec))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
