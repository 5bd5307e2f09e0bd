"""A bottleneck in the model: who sees whom, logits by definition, and what a cache keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgevlm.device import load_device
from edgevlm.errors import PassError
from edgevlm.model.bottleneck import hidden_of
from edgevlm.model.learned import learned_weights
from edgevlm.model.vlm import Vlm
from edgevlm.passes.base import Context
from edgevlm.passes.reduce import Reduce
from edgevlm.reduce.apply import apply_stage, numpy_apply_stage
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import View
from edgevlm_export.ops import CLOSED
from tests.edgevlm.caches import cached
from tests.edgevlm.reduce.deep import GRID, TOKENS, Asked, asked, deep_spec, model_of, staged
from tests.edgevlm.reduce.hiding import ROWS, deleted, hiding_model, hiding_spec, masked, unseen

# Logits of size 3 behind three layers, float32 against float64.
TOLERANCE = 2e-5
ANSWER = (5, 17, 33, 60)


def logits(model: Vlm, given: Asked) -> np.ndarray:
    """Of all rows [T, V]."""
    with torch.no_grad():
        found = model.whole(model.decoder, given.rows, given.positions, None, given.pictures)
    return found[0].numpy()


@pytest.mark.parametrize("num_pictures", [1, 2, 3])
def test_who_sees_whom(num_pictures: int) -> None:
    """No row behind a picture has access to its tokens, its own rows see all of them."""
    model = hiding_model(1)
    given = asked(model, num_pictures, answer=ANSWER)
    hidden = hidden_of(model.spec, torch.from_numpy(given.starts), given.rows)
    closed = hidden.closed[0, 0].numpy()
    np.testing.assert_array_equal(closed, np.where(unseen(model.spec, given), CLOSED, 0))
    length = given.rows.shape[1]
    sees = (closed == 0) & np.tri(length, dtype=bool)
    visual = {row for start in given.starts for row in range(start, start + TOKENS)}
    for start in given.starts:
        tokens, rows = slice(start, start + TOKENS), slice(start + TOKENS, start + TOKENS + ROWS)
        assert sees[rows, tokens].all()
        assert not sees[start + TOKENS + ROWS :, tokens].any()
        # Text before a picture is seen by all that follows.
        assert sees[start:, :4].all()
        assert sees[start + TOKENS + ROWS :, rows].all()
    np.testing.assert_array_equal(hidden.rows, [x for x in range(length) if x not in visual])
    # One mask of slots and rows: nothing is closed twice, which float16 could not hold.
    mask = hidden.mask(torch.tensor([[[[0.0, CLOSED]]]])).numpy()[0, 0]
    assert set(np.unique(mask)) == {0.0, CLOSED}
    np.testing.assert_array_equal(mask[:, 2:] == 0, sees)
    np.testing.assert_array_equal(mask[:, :2], np.tile([0, CLOSED], (length, 1)))


@pytest.mark.parametrize("num_pictures", [1, 2, 3])
def test_logits_by_definition(num_pictures: int) -> None:
    """With a mask, and with keys of visual tokens deleted and no mask."""
    model = hiding_model()
    given = asked(model, num_pictures, answer=ANSWER)
    want = masked(model, given)
    assert want.std() > 0.5
    without, num_keys = deleted(model, given)
    assert num_keys == given.rows.shape[1] - num_pictures * TOKENS
    np.testing.assert_allclose(without, want, atol=1e-10, rtol=0)
    np.testing.assert_allclose(logits(model, given), want, atol=TOLERANCE, rtol=0)


def changed(given: Asked, rows: Sequence[int]) -> Asked:
    """With other numbers in some rows."""
    random = torch.Generator().manual_seed(8)
    others = given.rows.clone()
    others[:, list(rows)] = torch.randn(1, len(rows), given.rows.shape[2], generator=random)
    return Asked(
        rows=others,
        positions=given.positions,
        starts=given.starts,
        weights=given.weights,
        num_prompt=given.num_prompt,
    )


def test_a_picture_is_known_through_its_rows_alone() -> None:
    """Of the tokens nothing comes through one layer, and through two what the rows have seen."""
    for num_layers, reaches in ((1, False), (2, True)):
        model = hiding_model(num_layers)
        given = asked(model, 1)
        (start,) = given.starts
        behind = start + TOKENS + ROWS
        other = changed(given, range(start, start + TOKENS))
        before, after = logits(model, given), logits(model, other)
        assert np.abs(before - after)[start:behind].max(1).min() > 0.1
        assert np.array_equal(before[:start], after[:start])
        difference = np.abs(before - after)[behind:].max()
        assert difference > 0.01 if reaches else difference == 0
        # Text before the picture is no part of what is hidden.
        moved = logits(model, changed(given, [0]))
        assert np.abs(before - moved)[behind:].max(1).min() > 0.001


def test_an_answer_row_by_row() -> None:
    """What the cache keeps is enough for the rows that follow."""
    model = hiding_model()
    prompt = asked(model, 2).prompt()
    stream = islice(model.greedy(prompt.rows, prompt.positions, prompt.pictures), 5)
    tokens, found = zip(*stream, strict=True)
    want = masked(model, asked(model, 2, answer=tokens[:-1]))[prompt.num_prompt - 1 :]
    np.testing.assert_allclose(torch.stack(found), want, atol=TOLERANCE, rtol=0)
    assert list(tokens) == want.argmax(1).tolist()


def test_a_decoder_of_its_own_for_prompts() -> None:
    model = hiding_model()
    given = asked(model, 2, answer=ANSWER)
    pictures = given.pictures
    with torch.no_grad():
        want = model.answer(given.rows, given.positions, given.num_prompt, pictures)
        model.split_phases()
        found = model.answer(given.rows, given.positions, given.num_prompt, pictures)
    np.testing.assert_allclose(want, masked(model, given)[given.num_prompt - 1 :], atol=TOLERANCE)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


def test_a_quantized_cache_rounds_what_is_kept_and_what_is_hidden() -> None:
    """A whole sequence and a cache row by row have the same numbers."""
    model = cached(hiding_spec(2), "int8")
    given = asked(model, 1, answer=ANSWER)
    with torch.no_grad():
        whole = model.answer(given.rows, given.positions, given.num_prompt, given.pictures)
    prompt = given.prompt()
    (_, first), *_ = islice(model.greedy(prompt.rows, prompt.positions, prompt.pictures), 1)
    torch.testing.assert_close(first, whole[0], atol=TOLERANCE, rtol=0)
    plain = hiding_model(2)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert np.abs(logits(plain, given)[given.num_prompt - 1 :] - whole.numpy()).max() > 1e-3


def test_rows_stand_behind_the_tokens_of_every_picture() -> None:
    model = hiding_model()
    weights = dict(learned_weights(model))
    assert {name: tuple(x.shape) for name, x in weights.items()} == {
        "reduce.0.learned.learned_rows.rows": (ROWS, 64)
    }
    (table,) = weights.values()
    pixels = torch.randn(2, *model.spec.vision.pixels_shape(GRID))
    with torch.no_grad():
        seen = model.visual(pixels)
        model.reduce = torch.nn.ModuleList()
        tokens = model.encode(pixels)
    assert torch.equal(seen.features[:, :TOKENS], tokens)
    assert torch.equal(seen.features[:, TOKENS:], table.expand(2, -1, -1))
    assert seen.places.tolist() == [list(range(TOKENS + ROWS))] * 2
    assert seen.grid is None


def test_its_twin() -> None:
    stage = hiding_spec().reduction.bottleneck
    random = np.random.default_rng(4)
    features, table = random.standard_normal((2, TOKENS, 8)), random.standard_normal((ROWS, 8))
    places = np.tile(np.arange(TOKENS), (2, 1))
    found = apply_stage(
        stage,
        View(
            tokens=VisSeq(
                features=torch.from_numpy(features).float(), places=torch.from_numpy(places)
            ),
            learned={"learned_rows": {"rows": torch.from_numpy(table).float()}},
        ),
    )
    twin = numpy_apply_stage(
        stage,
        View(
            tokens=VisSeq(features=features, places=places),
            learned={"learned_rows": {"rows": table}},
        ),
    )
    np.testing.assert_allclose(found.features, twin.features, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(found.places, twin.places)
    assert twin.features.shape == (2, TOKENS + ROWS, 8)


def test_fewer_tokens_come_to_it_behind_another_stage() -> None:
    spec = staged(
        deep_spec(),
        {"at": "projector", "keep": 12, "select": "uniform"},
        {"at": "projector", "keep": 3, "bottleneck": "learned_rows"},
    )
    assert (spec.entering, spec.hidden) == (15, 12)
    assert [(part.group, part.tokens) for part in spec.segments] == [("main", 3)]
    assert spec.image["tokens"] == [15]


def test_rows_from_a_file(tmp_path: Path) -> None:
    name = "reduce.0.learned.learned_rows.rows"
    table = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(2))
    save_file({name: table}, tmp_path / "voco.safetensors")
    context = Context(device=load_device("host-cpu"), targets=("ort",), folder=tmp_path)
    model = model_of(deep_spec(1))
    step = Reduce.model_validate({"method": "voco", "keep": ROWS, "weights": "voco.safetensors"})
    change = step.apply(model, context)
    assert change.sites == ("projector",)
    assert change.measures == {"visual_tokens_before": TOKENS, "visual_tokens": ROWS}
    assert torch.equal(dict(learned_weights(model))[name], table)
    more = Reduce.model_validate({"method": "voco", "keep": 5, "weights": "voco.safetensors"})
    with pytest.raises(PassError) as error:
        more.foresee(deep_spec(1), context)
    assert str(error.value) == (
        f"reduce: {name!r} in voco.safetensors has shape [4, 64], expected [5, 64]\n"
        "  hint: train it for this model and these stages"
    )
