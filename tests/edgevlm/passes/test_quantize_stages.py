"""Quantized models kept and put back: the same bits, and another key where anything differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgevlm.cache import StageCache
from edgevlm.passes import FoldNorms, Quantize, run_pass
from edgevlm.passes.stages import run_stages
from tests.edgevlm.calibrated import context, samples_of
from tests.edgevlm.passes.quantizing import EVERYTHING, probe
from tests.edgevlm.tiny import drawn, tiny_spec


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        (EVERYTHING, ("ort",)),
        ({"embedding": "int4"}, ("ort",)),
        ({"kv": {"dtype": "int4", "granularity": "tensor"}}, ("ort",)),
        ({"head": "w4a16"}, ("ort",)),
        ({"embedding": "int4", "head": {"scheme": "w4a16", "method": "gptq"}}, ("ort",)),
        ({"prefill": "w8a8"}, ("ort",)),
        (
            {
                "vision": "fp8",
                "decoder": "fp8",
                "prefill": {"scheme": "w4a16", "per_channel": True},
                "kv": "float8_e5m2",
            },
            ("static",),
        ),
    ],
    ids=["everything", "a table", "a cache", "a head", "a shared head", "prompts", "float8"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_kept_stage_gives_the_same_model(
    options: dict[str, Any],
    targets: tuple[str, ...],
    tied: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit by bit: its tensors, their names and sharing, its spec, and what it computes."""
    monkeypatch.setattr("edgevlm.passes.stages.WORTH_KEEPING_S", 0.0)
    monkeypatch.setattr("edgevlm.passes.stages.FILE_BYTES", 5_000)
    spec = tiny_spec(tied=tied)
    steps = [FoldNorms(), Quantize.model_validate(options)]
    here = context(samples_of(spec), targets=targets)
    cache = StageCache(root=tmp_path)
    first, applied = run_stages(steps, drawn(spec), here, cache, "model")
    assert len(list(tmp_path.glob("passes/*/weights-*.safetensors"))) > len(steps)

    def refused(*_: object) -> None:
        raise AssertionError("the pass ran again")

    monkeypatch.setattr("edgevlm.passes.stages.run_pass", refused)
    again, restored = run_stages(steps, drawn(spec), here, cache, "model")
    assert [entry.change for entry in restored] == [entry.change for entry in applied]
    assert again.spec == first.spec
    ours, theirs = dict(again.named_parameters()), dict(first.named_parameters())
    assert list(ours) == list(theirs)
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert torch.equal(_bits(weight), _bits(theirs[name])), name
    types = [
        {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
        for model in (again, first)
    ]
    assert types[0] == types[1]
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    assert not again.training
    assert torch.equal(probe(again), probe(first))


def _bits(weight: Tensor) -> Tensor:
    return weight.detach().view(torch.uint8) if "float8" in str(weight.dtype) else weight.detach()


def test_weights_that_did_not_change_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    monkeypatch.setattr("edgevlm.passes.stages.WORTH_KEEPING_S", 0.0)
    cache = StageCache(root=tmp_path)
    step = Quantize.model_validate({"projector": "w8a16"})
    run_stages([step], drawn(tiny_spec()), context(), cache, "model")
    (kept,) = tmp_path.glob("passes/*/weights-*.safetensors")
    with safe_open(kept, framework="pt") as file:
        assert sorted(file.keys()) == [
            f"projector.{part}.{name}"
            for part in ("down", "up")
            for name in ("bias", "scale", "weight")
        ]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_stage_of_other_samples_or_another_device_is_another(tmp_path: Path) -> None:
    """Only where samples and device are looked at: folding does not."""
    from edgevlm.passes.stages import chain

    step = Quantize.model_validate({"vision": {"scheme": "w8a8", "activations": "static"}})
    one, two = context(samples_key="1"), context(samples_key="2")
    static = context(targets=("static",), samples_key="1")
    assert len({chain("model", [step], here) for here in (one, two, static)}) == 3
    assert len({chain("model", [FoldNorms()], here) for here in (one, two, static)}) == 1
    other = Quantize.model_validate({"vision": "w8a8"})
    assert chain("model", [other], one) != chain("model", [step], one)


def test_more_bits_change_less() -> None:
    """Where the ranges were found on what is asked, so that nothing is clipped."""
    plain = probe(drawn(tiny_spec()))
    errors = []
    for scheme in ("w16a16", "w8a8"):
        model = drawn(tiny_spec())
        step = Quantize.model_validate(dict.fromkeys(("vision", "projector", "decoder"), scheme))
        run_pass(step, model, context(samples_of(tiny_spec(), 8, seed=7), targets=("static",)))
        errors.append(float((probe(model) - plain).abs().max()))
    assert 0 < errors[0] < 2e-3 < errors[1] < 0.5
