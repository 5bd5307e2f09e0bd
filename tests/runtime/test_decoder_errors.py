"""What a decoder refuses: rows, tokens and lengths that there are not, graphs that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm_runtime.errors import BundleError, EngineError, InputError
from tests.runtime.bundles import CAPACITY, embedding_graph, variant_of, write_manifest, write_toy
from tests.runtime.decoders import FORMS, TABLE, TOKENS, WEIGHTS, close, expected, opened, prompt_of
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.toy import PLAIN, delta_graph, toy_groups


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.mark.parametrize("rows", [[], [1, 1], [2, 0], [-1], [3]])
def test_rows_that_are_not_of_the_call(toy: Path, rows: list[int]) -> None:
    decoder = opened(toy)
    decoder.prefill(prompt_of(TOKENS[:7]))
    with pytest.raises(InputError) as error:
        decoder.extend([1, 2, 3], rows=rows)
    assert str(error.value) == (
        f"logits are wanted of rows {rows} of a call of 3 tokens\n"
        "  hint: name some of its rows, counted from 0 and ascending"
    )
    assert decoder.length == 7


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "call has no tokens\n  hint: give at least one"),
        ([400], "token 400 is not one of the 400 of the embedding"),
        ([-1], "token -1 is not one of the 400 of the embedding"),
        ([5, -1, 6], "token -1 is not one of the 400 of the embedding"),
        ([5, 400], "token 400 is not one of the 400 of the embedding"),
    ],
)
def test_tokens_that_there_are_not(toy: Path, tokens: list[int], message: str) -> None:
    decoder = opened(toy)
    decoder.prefill(prompt_of(TOKENS[:7]))
    with pytest.raises(InputError) as error:
        decoder.extend(tokens)
    assert str(error.value) == message
    assert decoder.length == 7


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_refused_before_anything_is_consumed(toy: Path, form: str) -> None:
    decoder = opened(toy, form)
    with pytest.raises(InputError) as error:
        decoder.prefill(prompt_of([1] * 70))
    assert str(error.value) == (
        "prompt of 70 tokens is 6 too long: 0 of the 64 tokens of the context are used\n"
        "  hint: shorten it by 6 tokens, or compile with a larger context"
    )
    assert decoder.length == 0
    decoder.prefill(prompt_of([1] * 62))
    with pytest.raises(InputError) as error:
        decoder.extend([1, 2, 3, 4])
    assert str(error.value) == (
        "call of 4 tokens is 2 too long: 62 of the 64 tokens of the context are used\n"
        "  hint: shorten it by 2 tokens, or compile with a larger context"
    )
    wanted = expected([1] * 62 + [1, 2])
    close(decoder.extend([1, 2]).logits, wanted[62:])
    assert decoder.length == decoder.capacity == CAPACITY


def test_rewind_refuses_the_future(toy: Path) -> None:
    decoder = opened(toy)
    decoder.prefill(prompt_of([1, 2, 3]))
    with pytest.raises(EngineError) as error:
        decoder.rewind(4)
    assert str(error.value) == (
        "cannot rewind to row 4, the decoder has consumed 3\n"
        "  hint: rewind goes back to a length that the decoder has had"
    )


def test_unknown_state_kinds_are_refused_by_name(tmp_path: Path) -> None:
    groups = toy_groups(PLAIN, {"main": 20}, "kv_quant")
    step = delta_graph(
        OnnxGraph(tmp_path, "step", "step"),
        PLAIN,
        WEIGHTS,
        {"main": 20},
        rows=1,
        num_logits=1,
        phases=("decode",),
    )
    variant = variant_of("static", (embedding_graph(tmp_path, TABLE), step), groups)
    path = write_manifest(tmp_path, {"static": variant})
    with pytest.raises(BundleError) as error:
        opened(path)
    assert str(error.value) == (
        "state 'key.0' is of kind 'kv_quant', this runtime has 'kv_inplace', 'kv_delta', "
        "'kv_window', 'conv', 'ssm', 'const'\n  hint: upgrade edgevlm-runtime"
    )


def test_graphs_of_a_phase_give_the_same_extras(tmp_path: Path) -> None:
    """Rows of one call may go to both, and what they give is joined."""
    graphs = [
        delta_graph(
            OnnxGraph(tmp_path, f"step_{rows}", "step"),
            PLAIN,
            WEIGHTS,
            {"main": 20},
            rows=rows,
            num_logits=rows,
            hidden=rows == 4,
            phases=("decode", "verify"),
        )
        for rows in (1, 4)
    ]
    state = toy_groups(PLAIN, {"main": 20}, "kv_delta")
    variant = variant_of("static", (embedding_graph(tmp_path, TABLE), *graphs), state)
    path = write_manifest(tmp_path, {"static": variant})
    with pytest.raises(BundleError) as error:
        opened(path)
    assert str(error.value) == (
        "step graphs 'step_1' and 'step_4' both serve the phase 'decode', and give other extras: "
        "none; 'hidden' per row\n"
        "  hint: compile the bundle again, with the same outputs for all graphs of a phase"
    )


def test_a_prompt_without_rows(toy: Path) -> None:
    decoder = opened(toy)
    for ask in (lambda: decoder.check_prompt(0), lambda: decoder.prefill(prompt_of([]))):
        with pytest.raises(InputError) as error:
            ask()
        assert str(error.value) == "prompt has no tokens\n  hint: give at least one"
