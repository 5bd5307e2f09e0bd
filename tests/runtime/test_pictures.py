"""Prompts with visual rows that a graph reduces: one call, equal to a float64 recurrence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import StepDecoder, open_decoder
from edgevlm_runtime.decode.step_graph import StepGraph
from edgevlm_runtime.engine import Engines
from edgevlm_runtime.engines.table import EmbeddingTable
from edgevlm_runtime.errors import EngineError, InputError
from tests.runtime.decoders import TABLE, TOKENS, opened, prompt_of
from tests.runtime.pictures import (
    COLUMNS,
    DROPPED,
    FORMS,
    Recurrence,
    check_caches,
    picture_prompt,
    write_bundle,
)
from tests.runtime.toy import Array

# Logits of up to 10 after four layers in float32.
TOLERANCE = 3e-5
PACKED = ((), ("late",))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Sequence[str]], Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return {
        (form, packed): write_bundle(folder / f"{form}{len(packed)}", form, packed=packed)
        for form in FORMS
        for packed in PACKED
    }


def close(got: Array, wanted: Array) -> None:
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0)


def used(decoder: StepDecoder) -> dict[str, int]:
    return {group.name: group.used for group in decoder._groups}


def graphs_run(decoder: StepDecoder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the graphs that it runs from now on."""
    run, names = decoder._run, []

    def noted(step: StepGraph, *arguments: object) -> object:
        names.append(step.graph.name)
        return run(step, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "_run", noted)
    return names


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_prompt_and_what_follows(
    bundles: dict[tuple[str, Sequence[str]], Path],
    form: str,
    packed: Sequence[str],
    pictures: int,
) -> None:
    decoder = opened(bundles[form, packed])
    prompt, recurrence = picture_prompt(pictures), Recurrence(packed=packed)
    num_rows = len(prompt.embeds)

    close(decoder.prefill(prompt).logits, recurrence.prefill(prompt))
    check_caches(decoder, recurrence, TOLERANCE)
    assert used(decoder) == {"early": num_rows, "late": num_rows - DROPPED * pictures}
    for token in TOKENS[20:23]:
        close(decoder.extend([token]).logits, recurrence.extend([token]))
    before = copy.deepcopy(recurrence)
    close(decoder.extend(TOKENS[23:26]).logits, recurrence.extend(TOKENS[23:26]))
    check_caches(decoder, recurrence, TOLERANCE)

    decoder.rewind(num_rows + 3)
    fork, other = decoder.fork(), copy.deepcopy(before)
    close(decoder.extend(TOKENS[30:32]).logits, before.extend(TOKENS[30:32]))
    close(fork.extend(TOKENS[33:34]).logits, other.extend(TOKENS[33:34]))
    check_caches(fork, other, TOLERANCE)
    check_caches(decoder, before, TOLERANCE)

    with pytest.raises(EngineError) as error:
        decoder.rewind(num_rows - 1)
    assert str(error.value) == (
        f"group 'late' cannot go back to row {num_rows - 1}: the call of rows 0 to {num_rows - 1} "
        "has dropped some\n  hint: rewind to 0 or less"
    )
    assert decoder.length == num_rows + 5
    decoder.rewind(num_rows)
    assert used(decoder) == {"early": num_rows, "late": num_rows - DROPPED * pictures}
    decoder.rewind(0)
    assert used(decoder) == {"early": 0, "late": 0}
    prompt, recurrence = picture_prompt(3 - pictures, seed=8), Recurrence(packed=packed)
    close(decoder.prefill(prompt).logits, recurrence.prefill(prompt))
    check_caches(decoder, recurrence, TOLERANCE)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("form", FORMS)
def test_a_second_turn_with_pictures(
    bundles: dict[tuple[str, Sequence[str]], Path], form: str, packed: Sequence[str]
) -> None:
    """A picture call after rows have been dropped; then text alone, in pieces."""
    decoder = opened(bundles[form, packed])
    recurrence = Recurrence(packed=packed)
    first, words = picture_prompt(1), TOKENS[:15]
    close(decoder.prefill(first).logits, recurrence.prefill(first))
    close(decoder.extend(TOKENS[5:7]).logits, recurrence.extend(TOKENS[5:7]))
    second = picture_prompt(2, begins_at=decoder.length, seed=4)
    close(decoder.prefill(second).logits, recurrence.prefill(second))
    check_caches(decoder, recurrence, TOLERANCE)
    length = decoder.length
    places = np.arange(length, length + len(words))
    text = prompt_of(words, places, length + len(words))
    close(decoder.prefill(text).logits, recurrence.prefill(text))
    close(decoder.extend([9]).logits, recurrence.extend([9]))
    check_caches(decoder, recurrence, TOLERANCE)
    decoder.rewind(length)
    with pytest.raises(EngineError) as error:
        decoder.rewind(length - 1)
    begin = len(first.embeds) + 2
    assert str(error.value) == (
        f"group 'late' cannot go back to row {length - 1}: the call of rows {begin} to "
        f"{length - 1} has dropped some\n  hint: rewind to {begin} or less"
    )
    decoder.rewind(begin)
    assert used(decoder) == {"early": begin, "late": begin - DROPPED}


def test_columns_follow_the_rows_that_reach_them(tmp_path: Path) -> None:
    """A convolution behind the reduction, with padding after its rows."""
    decoder = opened(write_bundle(tmp_path, "static", layers=COLUMNS))
    prompt, recurrence = picture_prompt(2), Recurrence(layers=COLUMNS)
    close(decoder.prefill(prompt).logits, recurrence.prefill(prompt))
    close(decoder.extend(TOKENS[:3]).logits, recurrence.extend(TOKENS[:3]))
    num_rows = len(prompt.embeds)
    decoder.rewind(num_rows)
    recurrence = Recurrence(layers=COLUMNS)
    recurrence.prefill(prompt)
    close(decoder.extend(TOKENS[7:8]).logits, recurrence.extend(TOKENS[7:8]))


def test_which_graph_reads_a_prompt(
    bundles: dict[tuple[str, Sequence[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one for as many pictures that pads least; never for text and tokens."""
    decoder = opened(bundles["static", ()])
    names = graphs_run(decoder, monkeypatch)
    wanted = []
    for pictures, words, name in (
        (1, 4, "picture_1_16"),
        (1, 7, "picture_1_16"),
        (1, 8, "picture_1_24"),
        (2, 1, "picture_2_30"),
    ):
        decoder.rewind(0)
        decoder.prefill(picture_prompt(pictures, words=words))
        wanted.append(name)
    decoder.extend([1])
    decoder.extend([1, 2, 3])
    decoder.prefill(prompt_of([1, 2]))
    assert names == [*wanted, "step_1", "step_4", "step_4"]


@pytest.mark.parametrize("packed", PACKED)
def test_calls_of_as_many_rows_with_more_pictures(
    bundles: dict[tuple[str, Sequence[str]], Path], packed: Sequence[str]
) -> None:
    """16 rows each; what was bound for the first is kept, and not for the second."""
    decoder = opened(bundles["ort", packed])
    for pictures, words in ((1, 7), (2, 1), (1, 7)):
        prompt, recurrence = picture_prompt(pictures, words=words), Recurrence(packed=packed)
        assert len(prompt.embeds) == 16
        decoder.rewind(0)
        close(decoder.prefill(prompt).logits, recurrence.prefill(prompt))
        check_caches(decoder, recurrence, TOLERANCE)


def test_one_call_however_long(
    bundles: dict[tuple[str, Sequence[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = opened(bundles["ort", ()])
    names = graphs_run(decoder, monkeypatch)
    decoder.prefill(picture_prompt(3, words=7))  # 28 rows, where text goes in pieces of 12
    decoder.prefill(prompt_of([1] * 13))
    assert names == ["picture", "step", "step"]
    assert used(decoder) == {"early": 41, "late": 41 - 3 * DROPPED}


ANY = "up to 40 with any number"
FIXED = "up to 16 with 1, up to 24 with 1, up to 30 with 2"


@pytest.mark.parametrize(
    ("form", "pictures", "words", "has", "takes"),
    [
        ("ort", 2, 26, "41 tokens with 2", ANY),
        ("static", 1, 16, "25 tokens with 1", FIXED),
        ("static", 3, 2, "23 tokens with 3", FIXED),
    ],
)
def test_prompts_that_no_graph_takes(
    bundles: dict[tuple[str, Sequence[str]], Path],
    form: str,
    pictures: int,
    words: int,
    has: str,
    takes: str,
) -> None:
    decoder = opened(bundles[form, ()])
    prompt = picture_prompt(pictures, words=words)
    for ask in (
        lambda: decoder.prefill(prompt),
        lambda: decoder.check_prompt(len(prompt.embeds), pictures),
    ):
        with pytest.raises(InputError) as error:
            ask()
        assert str(error.value) == (
            f"prompt has {has} pictures or tiles, the bundle takes {takes}\n"
            "  hint: shorten the prompt, or compile for more rows or pictures"
        )
    assert (decoder.length, used(decoder)) == (0, {"early": 0, "late": 0})


@pytest.mark.parametrize("form", FORMS)
def test_room_counts_the_rows_that_reach_a_group(
    bundles: dict[tuple[str, Sequence[str]], Path], form: str
) -> None:
    """The late group has 60 slots, and gets 6 rows less."""
    decoder = opened(bundles[form, ()])
    prompt = picture_prompt(2)  # 19 rows
    decoder.prefill(prompt_of([1] * 47))
    decoder.check_prompt(19, 2)
    with pytest.raises(InputError) as error:
        decoder.check_prompt(19)
    assert str(error.value) == (
        "prompt of 19 tokens is 6 too long: 47 of the 60 tokens of the context are used\n"
        "  hint: shorten it by 6 tokens, or compile with a larger context"
    )
    decoder.extend([1])
    with pytest.raises(InputError) as error:
        decoder.prefill(prompt)
    assert str(error.value) == (
        "prompt of 19 tokens is 1 too long: 48 of the 60 tokens of the context are used\n"
        "  hint: shorten it by 1 tokens, or compile with a larger context"
    )
    assert used(decoder) == {"early": 48, "late": 48}
    decoder.rewind(47)
    decoder.prefill(prompt)
    assert used(decoder) == {"early": 66, "late": 60}
    assert decoder.length == decoder.capacity == 66


def test_a_picture_prompt_of_dropped_rows_alone(
    bundles: dict[tuple[str, Sequence[str]], Path],
) -> None:
    decoder = opened(bundles["ort", ()])
    prompt = picture_prompt(1)
    with pytest.raises(InputError) as error:
        decoder.prefill(replace(prompt, embeds=prompt.embeds[:3], positions=np.arange(3)))
    assert str(error.value) == (
        "graph 'picture' drops 3 of the rows of every call, got a piece of 3\n"
        "  hint: lengthen the prompt, or compile with another size of pieces"
    )


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_the_prompt_lacks(
    bundles: dict[tuple[str, Sequence[str]], Path], form: str
) -> None:
    decoder = opened(bundles[form, ()])
    prompt = picture_prompt(1)
    with pytest.raises(EngineError) as error:
        decoder.prefill(replace(prompt, row_weights={"text": prompt.row_weights["question"]}))
    assert str(error.value) == (
        f"graph '{'picture' if form == 'ort' else 'picture_1_16'}' wants the row weights "
        "'question', which the prompt lacks\n"
        "  hint: pass them with the prompt, as row_weights={...}"
    )
    assert decoder.length == 0
    recurrence = Recurrence()
    close(decoder.prefill(prompt).logits, recurrence.prefill(prompt))


@pytest.mark.parametrize(("form", "picture"), [("ort", "picture"), ("static", "picture_1_24")])
def test_the_graph_of_one_picture_is_loaded_with_the_others(
    bundles: dict[tuple[str, Sequence[str]], Path], form: str, picture: str
) -> None:
    """Of several, that of the most rows with the fewest pictures."""
    bundle = Bundle.open(bundles[form, ()])
    engines = Engines(bundle)
    open_decoder(bundle, engines, EmbeddingTable(TABLE)).load()
    steps = ("step",) if form == "ort" else ("step_4", "step_1")
    assert engines.names == (*steps, picture)
