"""The runner of passes: promises are verified, refusals come first, order is the recipe's."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from edgevlm.device import load_device
from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Change, Context, Foresight, Pass, run_pass, run_passes
from tests.edgevlm.tiny import drawn, tiny_spec


class Scale(Pass):
    """Multiplies the head, which it says is lossless."""

    name: ClassVar[str] = "scale"
    lossless: ClassVar[bool] = True

    factor: float

    def foresee(self, spec: VlmSpec) -> Foresight:
        return Foresight(spec=spec, effect="none")

    def check(self, model: Vlm, context: Context) -> None:
        if self.factor == 0:
            raise PassError("factor must not be 0", name=self.name, site="decoder.head")

    def apply(self, model: Vlm, context: Context) -> Change:
        with torch.no_grad():
            model.decoder.head.weight.mul_(self.factor)
        return Change(sites=("decoder.head",))


def probe(model: Vlm) -> Tensor:
    with torch.no_grad():
        return model(model.embed(torch.arange(6)), torch.arange(6))


def context() -> Context:
    return Context(device=load_device("host-cpu"), probe=probe)


def test_a_promise_that_holds() -> None:
    model = drawn(tiny_spec(tied=False))
    applied = run_passes([Scale(factor=2.0), Scale(factor=1.0)][1:], model, context())
    assert [(done.step, done.change.sites) for done in applied] == [
        (Scale(factor=1.0), ("decoder.head",))
    ]


def test_a_broken_promise_is_an_error() -> None:
    model = drawn(tiny_spec(tied=False))
    before = probe(model)
    error = float((before * 2.0 - before).abs().max())
    allowed = 1e-4 * max(1.0, float(before.std()))
    with pytest.raises(PassError) as caught:
        run_pass(Scale(factor=2.0), model, context())
    assert str(caught.value) == (
        f"scale: promised the same logits, and moved one by {error:.2g}, allowed {allowed:.2g}"
    )


def test_nan_is_not_small() -> None:
    model = drawn(tiny_spec(tied=False))

    class Poison(Scale):
        name: ClassVar[str] = "poison"

        def apply(self, model: Vlm, context: Context) -> Change:
            with torch.no_grad():
                model.decoder.head.weight[0, 0] = math.nan
            return Change(sites=("decoder.head",))

    with pytest.raises(PassError, match="poison: promised the same logits, and moved one by nan"):
        run_pass(Poison(factor=1.0), model, context())


def test_check_comes_before_apply() -> None:
    model = drawn(tiny_spec(tied=False))
    before = model.decoder.head.weight.clone()
    with pytest.raises(PassError) as caught:
        run_pass(Scale(factor=0.0), model, context())
    assert str(caught.value) == "scale at decoder.head: factor must not be 0"
    assert torch.equal(model.decoder.head.weight, before)
