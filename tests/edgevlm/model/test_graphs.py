"""The forms of a step are one model: the same logits from a whole sequence and in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgevlm.errors import ModelError
from edgevlm.model.graphs import delta_step, inplace_step, vision_graph
from edgevlm.model.rope import rope_tables
from edgevlm.model.spec import DecoderSpec
from edgevlm.model.vlm import Vlm
from edgevlm_export.ops import CLOSED
from tests.edgevlm.model.tiny import RMS_NORM, attention, decoder, drawn, vision, vlm_spec

CAPACITY = 24
# Two ways to the same float32 sums.
TOLERANCE = 2e-5

DECODERS = {
    "grouped heads, partial rotary": decoder(attention(), attention()),
    "head norms, tied": decoder(attention(head_norm=RMS_NORM), attention(), tied=True),
}
WINDOWED = decoder(attention(window=5), attention())


def model_of(spec: DecoderSpec) -> Vlm:
    return drawn(vlm_spec(spec, vision()))


def rows_of(model: Vlm, num_rows: int) -> Tensor:
    return model.embedding(torch.randint(0, 50, (1, num_rows), generator=seeded(1)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", [*DECODERS, "window"])
def test_inplace_step_in_chunks_equals_the_whole_sequence(name: str) -> None:
    model = model_of(WINDOWED if name == "window" else DECODERS[name])
    rows = rows_of(model, 16)
    # Gaps: a position is not a slot.
    positions = torch.arange(16) + 3 * (torch.arange(16) > 6)
    expected = model(rows, positions)
    graph = inplace_step(model, CAPACITY)
    cos, sin = rope_tables(model.spec.decoder.rope, positions)
    past = [torch.full_like(tensor, torch.nan) for tensor in graph.examples[6:]]
    for start, end in ((0, 9), (9, 10), (10, 16)):
        pad = (0, 0, 0, CAPACITY - (end - start))
        logits, *past = graph.module(
            rows[:, start:end],
            torch.nn.functional.pad(cos[start:end], pad),
            torch.nn.functional.pad(sin[start:end], pad),
            torch.tensor([end - 1], dtype=torch.int32),
            torch.tensor(end, dtype=torch.int32),
            torch.arange(end - start),
            *past,
        )
        torch.testing.assert_close(logits, expected[:, start:end], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_delta_step_in_chunks_equals_the_whole_sequence(name: str) -> None:
    model = model_of(DECODERS[name])
    rows = rows_of(model, 16)
    positions = torch.arange(16) + 3 * (torch.arange(16) > 6)
    expected = model(rows, positions)
    cos, sin = rope_tables(model.spec.decoder.rope, positions)
    graph = delta_step(model, CAPACITY, 8)
    past = [torch.zeros_like(tensor) for tensor in graph.examples[5:]]
    for start in (0, 8):
        mask = torch.full((8, CAPACITY + 8), CLOSED)
        mask[:, :start] = 0.0
        mask[:, CAPACITY:] = torch.full((8, 8), CLOSED).triu(1)
        part = slice(start, start + 8)
        logits, *new = graph.module(
            rows[:, part], cos[part], sin[part], mask[None, None], torch.arange(8), *past
        )
        torch.testing.assert_close(logits, expected[:, part], atol=TOLERANCE, rtol=0)
        for buffer, values in zip(past, new, strict=True):
            buffer[:, :, part] = values


def test_greedy_equals_recomputing_the_whole_sequence() -> None:
    model = model_of(WINDOWED)
    rows, positions = rows_of(model, 6), torch.arange(6)
    stream = model.greedy(rows, positions)
    for token, logits in (next(stream) for _ in range(8)):
        whole = model(rows, torch.arange(rows.shape[1]))[0, -1]
        torch.testing.assert_close(logits, whole, atol=TOLERANCE, rtol=0)
        assert token == int(whole.argmax())
        rows = torch.cat([rows, model.embedding(torch.tensor([[token]]))], dim=1)


def test_vision_graph_equals_the_model() -> None:
    model = model_of(DECODERS["grouped heads, partial rotary"])
    graph = vision_graph(model)
    assert torch.equal(graph.module(*graph.examples), model.encode(*graph.examples))


@pytest.mark.parametrize("form", ["vision", "inplace", "delta 1", "delta 32"])
def test_examples_and_outputs_have_the_shapes_of_the_plan(form: str) -> None:
    model = model_of(DECODERS["head norms, tied"])
    graph = {
        "vision": lambda: vision_graph(model),
        "inplace": lambda: inplace_step(model, CAPACITY),
        "delta 1": lambda: delta_step(model, CAPACITY, 1),
        "delta 32": lambda: delta_step(model, CAPACITY, 32),
    }[form]()
    outputs = graph.module(*graph.examples)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sizes: dict[str, int] = {}
    for specs, tensors in ((graph.plan.inputs, graph.examples), (graph.plan.outputs, outputs)):
        for spec, tensor in zip(specs, tensors, strict=True):
            assert str(tensor.dtype) == f"torch.{spec.dtype}", spec.name
            named = zip(spec.shape, tensor.shape, strict=True)
            expected = [sizes.setdefault(x, n) if isinstance(x, str) else x for x, n in named]
            assert list(tensor.shape) == expected, spec.name


def test_delta_step_refuses_a_window_below_its_capacity() -> None:
    with pytest.raises(ModelError) as error:
        delta_step(model_of(WINDOWED), CAPACITY, 8)
    assert str(error.value) == (
        "decoder.layers.0 sees a window of 5 rows, and the static form has one mask over all "
        "24 slots\n"
        "  hint: lower the context to at most 5 tokens, or choose a target with windows"
    )


def test_a_window_of_the_whole_capacity_is_no_window() -> None:
    assert delta_step(model_of(decoder(attention(window=CAPACITY))), CAPACITY, 1).plan.inputs


def test_every_norm_with_linear_consumers_is_named() -> None:
    untied = model_of(decoder(attention(), attention()))
    pairs = dict(untied.norm_consumers())
    assert pairs["decoder.norm"] == ("decoder.head",)
    assert pairs["decoder.layers.1.norm1"] == ("decoder.layers.1.attention.qkv",)
    assert pairs["decoder.layers.1.norm2"] == (
        "decoder.layers.1.mlp.gate",
        "decoder.layers.1.mlp.up",
    )
    assert pairs["vision.layers.0.norm2"] == ("vision.layers.0.mlp.up",)
    assert len(pairs) == 9
    sites = dict(untied.named_modules())
    assert all(isinstance(sites[s], torch.nn.Linear) for ours in pairs.values() for s in ours)
    assert "decoder.norm" not in dict(model_of(DECODERS["head norms, tied"]).norm_consumers())
