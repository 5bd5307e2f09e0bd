"""Step graphs of a model with a bottleneck, run by the runtime: logits by definition.

A prompt with pictures goes through the graph of the phase `picture`, which keeps the rows that are
not hidden; its answer goes through the graphs for tokens, over the same state.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgevlm.model.vlm import Vlm
from edgevlm_runtime.decode.protocol import Prompt
from edgevlm_runtime.errors import EngineError, InputError
from tests.edgevlm.caches import cached
from tests.edgevlm.reduce.bundled import (
    CAPACITY,
    TARGET_NAMES,
    Bundled,
    answered,
    prompt_of,
    used_slots,
)
from tests.edgevlm.reduce.deep import TOKENS, Asked, asked
from tests.edgevlm.reduce.hiding import ROWS, hiding_model, hiding_spec, masked

# Logits of size 3 behind two layers, float32 against float64.
TOLERANCE = 2e-5
ANSWER = (5, 17, 33, 60)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Bundled:
    """The model and its bundle."""
    return Bundled(tmp_path_factory.mktemp("hiding") / "bundle", 2, (), None, hiding_model(2))


def wanted(model: Vlm, given: Asked) -> np.ndarray:
    """Logits [A + 1, V] of the prompt's last row and of the answer's."""
    return masked(model, given)[given.num_prompt - 1 :]


@pytest.mark.parametrize("num_pictures", [1, 2])
@pytest.mark.parametrize("target", TARGET_NAMES)
def test_a_prompt_and_its_answer(bundled: Bundled, target: str, num_pictures: int) -> None:
    """Token by token, then several at once after a rewind, and another answer on a fork."""
    model = bundled.model
    given = asked(model, num_pictures, answer=ANSWER)
    want = wanted(model, given)
    assert want.std() > 0.5
    decoder = bundled.decoder(target)
    np.testing.assert_allclose(answered(decoder, given, ANSWER), want, atol=TOLERANCE, rtol=0)

    length = given.num_prompt
    assert decoder.length == length + len(ANSWER)
    assert used_slots(decoder) == {"main": length + len(ANSWER) - num_pictures * TOKENS}

    decoder.rewind(length + 1)
    fork = decoder.fork()
    got = decoder.extend(ANSWER[1:]).logits
    np.testing.assert_allclose(got, want[2:], atol=TOLERANCE, rtol=0)
    other = (ANSWER[0], 44, 8)
    want = wanted(model, asked(model, num_pictures, answer=other))
    got = np.stack([fork.extend([token]).logits[0].copy() for token in other[1:]])
    np.testing.assert_allclose(got, want[2:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_a_second_prompt_behind_the_first(bundled: Bundled, target: str) -> None:
    """Its rows see those of the first that are kept, and its picture does too."""
    model = bundled.model
    whole = asked(model, 2, answer=ANSWER)
    # All that comes before the second picture, and the word before it, is a prompt of its own.
    middle = int(whole.starts[1]) - 1
    first, second = part(whole, 0, middle), part(whole, middle, whole.num_prompt)
    want = wanted(model, whole)
    decoder = bundled.decoder(target)
    decoder.prefill(first)
    assert used_slots(decoder) == {"main": middle - TOKENS}
    rows = [decoder.prefill(second).logits[0].copy()]
    rows += [decoder.extend([token]).logits[0].copy() for token in ANSWER]
    np.testing.assert_allclose(np.stack(rows), want, atol=TOLERANCE, rtol=0)
    assert used_slots(decoder) == {"main": whole.num_prompt + len(ANSWER) - 2 * TOKENS}
    with pytest.raises(EngineError) as error:
        decoder.rewind(middle + 3)
    assert str(error.value) == (
        f"group 'main' cannot go back to row {middle + 3}: the call of rows {middle} to "
        f"{whole.num_prompt - 1} has dropped some\n  hint: rewind to {middle} or less"
    )
    decoder.rewind(middle)
    got = decoder.prefill(second).logits[0]
    np.testing.assert_allclose(got, want[0], atol=TOLERANCE, rtol=0)


def part(given: Asked, begin: int, end: int) -> Prompt:
    """Some rows of a prompt as one of their own."""
    starts = given.starts[(given.starts >= begin) & (given.starts < end)]
    return Prompt(
        embeds=given.rows[0, begin:end].numpy(),
        positions=given.positions[begin:end].numpy(),
        next_position=float(end),
        picture_rows=starts - begin,
        row_weights={kind: x[begin:end] for kind, x in given.weights.items()},
    )


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_a_second_prompt_after_a_rewind(bundled: Bundled, target: str) -> None:
    """Nothing of the first is left."""
    model = bundled.model
    decoder = bundled.decoder(target)
    decoder.prefill(prompt_of(asked(model, 2)))
    decoder.rewind(0)
    given = asked(model, 1, answer=ANSWER, seed=5)
    got = answered(decoder, given, ANSWER)
    np.testing.assert_allclose(got, wanted(model, given), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_text_alone_has_nothing_to_hide(bundled: Bundled, target: str) -> None:
    model = bundled.model
    given = asked(model, 0, answer=ANSWER)
    decoder = bundled.decoder(target)
    got = answered(decoder, given, ANSWER)
    np.testing.assert_allclose(got, wanted(model, given), atol=TOLERANCE, rtol=0)
    assert used_slots(decoder) == {"main": given.num_prompt + len(ANSWER)}


def test_more_pictures_than_a_fixed_shape_has(bundled: Bundled) -> None:
    model = bundled.model
    given = asked(model, 4, answer=ANSWER)
    got = answered(bundled.decoder("ort"), given, ANSWER)
    np.testing.assert_allclose(got, wanted(model, given), atol=TOLERANCE, rtol=0)
    with pytest.raises(InputError) as error:
        bundled.decoder("static").prefill(prompt_of(given))
    assert str(error.value) == (
        f"prompt has {given.num_prompt} tokens with 4 pictures or tiles, the bundle takes up to "
        "160 with 1, up to 192 with 2\n"
        "  hint: shorten the prompt, or compile for more rows or pictures"
    )


def test_the_context_is_charged_for_the_rows_that_stay(bundled: Bundled) -> None:
    """Each picture takes four slots and forty positions: these run out first here."""
    model = bundled.model
    decoder = bundled.decoder("ort")
    prompt = prompt_of(asked(model, 4))
    size = len(prompt.embeds)
    taken = 12 + 4 * (ROWS + 1)
    decoder.prefill(prompt)
    assert used_slots(decoder) == {"main": taken}
    assert size - taken == 4 * TOKENS
    assert CAPACITY - taken > taken
    with pytest.raises(InputError) as error:
        decoder.prefill(prompt)
    assert str(error.value) == (
        f"prompt of {size} tokens is {2 * size - 256} too long: {size} of the 256 tokens of the "
        f"context are used\n  hint: shorten it by {2 * size - 256} tokens, or compile with a "
        "larger context"
    )
    text = prompt_of(asked(model, 0))
    for _ in range(4):
        decoder.prefill(text)
    assert used_slots(decoder) == {"main": taken + 4 * 12}


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_a_quantized_cache(target: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A graph rounds the rows of a call as the model does, whether they stay or not."""
    model = cached(hiding_spec(2), "int8")
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    decoder = Bundled(folder, 2, (), None, model).decoder(target)
    given = asked(model, 2, answer=ANSWER)
    with torch.no_grad():
        pictures = given.pictures
        want = model.answer(given.rows, given.positions, given.num_prompt, pictures).numpy()
    np.testing.assert_allclose(answered(decoder, given, ANSWER), want, atol=TOLERANCE, rtol=0)
