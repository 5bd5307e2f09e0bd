"""A quantized cache in the model: whole sequences, both steps and the greedy loop agree."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.errors import ModelError
from edgevlm.model.graphs import DeltaStep, InplaceStep
from edgevlm.model.plans import delta_plan, delta_state, inplace_plan, inplace_state
from edgevlm.model.rope import rope_tables
from edgevlm.model.spec import KvQuant
from edgevlm.model.vlm import Vlm
from edgevlm_export.ops import CLOSED, causal_mask
from tests.edgevlm.caches import POSITIONS, cached, cores_of, rows_of, scales_of, with_cache
from tests.edgevlm.tiny import tiny_spec

# Logits of size 1 after two layers in float32, whose sums have different orders.
TOLERANCE = 2e-5
CAPACITY, LENGTH = 48, 40
CASES = [
    ("int8", "channel"),
    ("int8", "tensor"),
    ("int4", "channel"),
    ("float8_e4m3fn", "tensor"),
    ("float8_e5m2", "channel"),
]


@pytest.fixture(scope="module", params=CASES, ids=[" ".join(case) for case in CASES])
def model(request: pytest.FixtureRequest) -> Vlm:
    return cached(tiny_spec(), *request.param)


@torch.no_grad()
def whole(model: Vlm) -> Tensor:
    logits: Tensor = model(rows_of(model), POSITIONS)[0]
    return logits


def test_scales_begin_at_one_and_are_no_weights_to_train() -> None:
    for granularity, shape in (("tensor", (1,)), ("channel", (2, 1, 16))):
        kv = KvQuant(dtype="int8", granularity=granularity)
        for core in cores_of(Vlm(with_cache(tiny_spec(), kv))):
            for scale in (core.k_scale, core.v_scale):
                assert scale is not None
                assert (scale.shape, scale.requires_grad) == (shape, False)
                assert torch.equal(scale, torch.ones(shape))
    names = [name for name, _ in Vlm(with_cache(tiny_spec(), kv)).named_parameters()]
    assert "decoder.layers.1.attention.core.v_scale" in names
    assert all(core.k_scale is None for core in cores_of(Vlm(tiny_spec())))


def test_rounding_changes_what_is_said() -> None:
    """By less, the finer the grid is; an error of float32 would be a thousand times smaller."""
    errors = {}
    for dtype, _ in CASES:
        model = cached(tiny_spec(), dtype)
        exact = Vlm(tiny_spec()).eval()
        exact.load_state_dict(model.state_dict(), strict=False)
        errors[dtype] = float((whole(model) - whole(exact)).std())
    assert 100 * TOLERANCE < errors["int8"] < errors["float8_e4m3fn"] < errors["float8_e5m2"]
    assert errors["float8_e5m2"] < errors["int4"] < 0.3


@torch.no_grad()
def in_steps(model: Vlm, form: str, ends: list[int]) -> Tensor:
    """Logits of every row, in calls that end at these rows."""
    rows, logits = rows_of(model), []
    empty = torch.zeros(1, 2, CAPACITY, 16)
    past = [core.stored(empty, scale) for core in cores_of(model) for scale in scales_of(core)]
    for start, end in itertools.pairwise([0, *ends]):
        count = end - start
        cos, sin = rope_tables(model.spec.decoder.rope, POSITIONS[start:end])
        wanted = torch.arange(count)
        if form == "inplace":
            plan = inplace_plan(tiny_spec(), CAPACITY)
            step = InplaceStep(model, model.decoder, plan, prompt=False)
            lengths = torch.tensor([end - 1], dtype=torch.int32), torch.tensor(end)
            out, *past = step(rows[:, start:end], cos, sin, *lengths, wanted, *past)
        else:
            mask = torch.full((count, CAPACITY + count), CLOSED)
            mask[:, :start] = 0
            mask[:, CAPACITY:] = causal_mask(count, count, closed=CLOSED)
            delta = DeltaStep(model, model.decoder, delta_plan(tiny_spec(), CAPACITY, count))
            out, *news = delta(rows[:, start:end], cos, sin, mask[None, None], wanted, *past)
            for buffer, new in zip(past, news, strict=True):
                assert buffer.dtype == new.dtype
                buffer[:, :, start:end] = new
        logits.append(out[0])
    return torch.cat(logits)


@pytest.mark.parametrize("form", ["inplace", "delta"])
def test_steps_give_what_the_whole_sequence_gives(model: Vlm, form: str) -> None:
    expected = whole(model)
    assert float(expected.std()) > 0.5
    for ends in ([LENGTH], [20, 21, 22, LENGTH]):
        logits = in_steps(model, form, ends)
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def test_the_greedy_loop_keeps_numbers_of_the_grid(model: Vlm) -> None:
    """Its logits are those of the whole sequence that it has made, row by row."""
    rows, positions = rows_of(model, 12), POSITIONS[:12]
    answer = list(itertools.islice(model.greedy(rows, positions), 6))
    tokens = [token for token, _ in answer]
    made = torch.cat([rows, model.embedding(torch.tensor([tokens]))], dim=1)
    after = torch.arange(6) + int(positions.max()) + 1
    with torch.no_grad():
        logits = model(made, torch.cat([positions, after]))[0, 11:-1]
    for row, (token, given) in zip(logits, answer, strict=True):
        assert int(row.argmax()) == token
        np.testing.assert_allclose(given, row, atol=TOLERANCE, rtol=0)


def state_of(dtype: str, plan: Any) -> set[tuple[str, tuple[int, ...]]]:
    spec = with_cache(tiny_spec(), KvQuant(dtype=dtype, granularity="tensor"))
    group = plan(spec, 4096)
    assert len(group.tensors) == 4
    return {(tensor.dtype, tensor.shape) for tensor in group.tensors}


def test_state_has_the_dtype_and_shape_of_what_is_stored() -> None:
    assert state_of("int8", inplace_state) == {("int8", (1, 2, 4096, 16))}
    assert state_of("int4", inplace_state) == {("uint8", (1, 2, 4096, 8))}
    assert state_of("int8", delta_state) == {("int8", (1, 2, 4096, 16))}
    assert state_of("float8_e5m2", delta_state) == {("float8_e5m2", (1, 2, 4096, 16))}
    int4 = with_cache(tiny_spec(), KvQuant(dtype="int4", granularity="channel"))
    assert inplace_state(int4, 4096).nbytes == 4 * 2 * 4096 * 8
    assert inplace_state(tiny_spec(), 4096).nbytes == 4 * 2 * 4096 * 16 * 4
    plan = inplace_plan(int4, 64)
    assert {spec.dtype for spec in plan.inputs if "state:" in spec.source} == {"uint8"}
    assert [(spec.dtype, spec.shape) for spec in plan.outputs[1:]] == [("uint8", (1, 2, 64, 8))] * 4


def test_what_a_form_cannot_keep_is_refused_by_the_plan() -> None:
    spec = with_cache(tiny_spec(), KvQuant(dtype="float8_e4m3fn", granularity="tensor"))
    with pytest.raises(ModelError) as error:
        inplace_plan(spec, 64)
    assert str(error.value) == (
        "decoder.layers.0 has a cache of float8_e4m3fn, which a step that extends its cache "
        "cannot keep\n  hint: choose int8 or int4, or another target"
    )
    spec = with_cache(tiny_spec(), KvQuant(dtype="int4", granularity="tensor"))
    with pytest.raises(ModelError) as error:
        delta_plan(spec, 64, 8)
    assert str(error.value) == (
        "decoder.layers.0 has a cache of int4, which a static step cannot keep\n"
        "  hint: choose int8 or float8_e4m3fn or float8_e5m2, or another target"
    )
