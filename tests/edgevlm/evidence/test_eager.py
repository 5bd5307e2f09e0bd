"""Our model as a witness: along the parent's answer, and what follows it along its own."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.evidence.eager import eager_witness
from edgevlm.evidence.fed import positions
from edgevlm.evidence.witness import Question, Witness, load, save
from edgevlm.model.vlm import Vlm
from tests.edgevlm.calibrated import quantized, samples_of
from tests.edgevlm.tiny import drawn, tiny_spec

LENGTH = 6


@torch.no_grad()
def prompt_of(model: Vlm, question: Question) -> tuple[Tensor, Tensor]:
    """Visual tokens [M, W] and embedded rows [1, T, W]."""
    visual = model.encode(torch.from_numpy(question.feeds[0]["pixels"]))[0]
    return visual, model.embed(torch.from_numpy(question.prompt.token_ids), visual)


def greedy(model: Vlm, question: Question, rows: Tensor, count: int) -> tuple[int, ...]:
    return tuple(token for token, _ in islice(model.greedy(rows, positions(question, 0)), count))


@torch.no_grad()
def along(model: Vlm, question: Question, rows: Tensor, answer: tuple[int, ...]) -> np.ndarray:
    fed = torch.tensor(answer[:-1], dtype=torch.long)
    whole = torch.cat([rows, model.embedding(fed)[None]], dim=1)
    places = positions(question, len(fed))
    return model.answer(whole, places, rows.shape[1]).numpy()


class Story:
    """A float model's answer, and a model of few bits that answers otherwise."""

    def __init__(self) -> None:
        self.model = drawn(tiny_spec())
        options = {"decoder": {"scheme": "w4a16", "per_channel": True}, "prefill": "w8a8"}
        quantized(self.model, {**options, "head": "w8a16"})
        plain = drawn(tiny_spec())
        for seed in range(20):
            self.question = samples_of(plain.spec, 1, seed=seed)[0].question
            visual, rows = prompt_of(plain, self.question)
            answer = greedy(plain, self.question, rows, LENGTH)
            fed = self.model.embed(torch.from_numpy(self.question.prompt.token_ids), visual)
            self.own = greedy(self.model, self.question, fed.detach(), LENGTH + 3)
            self.rows = fed.detach()
            if answer[0] == self.own[0] and answer != self.own[:LENGTH]:
                break
        else:
            pytest.fail("no question on which the two part after the first token")
        self.parent = Witness(
            vision=(),
            projector=(visual.numpy(),),
            answer=answer,
            logits=along(plain, self.question, rows, answer),
        )
        self.parting = next(i for i, token in enumerate(answer) if token != self.own[i])

    def witness(self, *, generates: bool = True, end_tokens: tuple[int, ...] = ()) -> Witness:
        return eager_witness(
            self.model,
            self.question,
            self.parent,
            end_tokens=frozenset(end_tokens),
            max_new_tokens=LENGTH + 3,
            generates=generates,
        )


@pytest.fixture(scope="module")
def story() -> Story:
    return Story()


def test_logits_are_along_the_parents_answer_and_the_answer_is_its_own(story: Story) -> None:
    """An answer may be longer than the parent's."""
    found = story.witness()
    want = along(story.model, story.question, story.rows, story.parent.answer)
    np.testing.assert_array_equal(found.logits, want)
    assert found.answer == story.own
    assert found.free is not None
    assert found.free.shape == (LENGTH + 3, 96)


def test_what_follows_is_held_to_the_rows_of_the_answer_that_it_gives(story: Story) -> None:
    """The rows after the first token that differs are of another text."""
    found = story.witness().leading()
    want = along(story.model, story.question, story.rows, story.own)
    # The same sums over another number of rows.
    np.testing.assert_allclose(found.logits, want, atol=2e-5, rtol=0)
    assert tuple(found.logits.argmax(axis=1)) == found.answer == story.own
    behind = np.abs(story.witness().logits[story.parting + 1] - want[story.parting + 1]).max()
    assert behind > 0.1


def test_an_answer_ends_with_its_end_token(story: Story) -> None:
    found = story.witness(end_tokens=(story.own[story.parting],))
    end = 1 + story.own.index(story.own[story.parting])
    assert found.answer == story.own[:end]
    assert found.leading().logits.shape == (end, 96)
    assert len(found.logits) == LENGTH


def test_where_nothing_is_generated_it_ends_at_the_first_token_that_differs(story: Story) -> None:
    found = story.witness(generates=False)
    assert found.answer == story.own[: story.parting + 1]
    assert len(found.logits) == LENGTH
    led = found.leading()
    np.testing.assert_array_equal(led.logits, found.logits[: story.parting + 1])


def test_the_same_answer_needs_no_other_logits(story: Story) -> None:
    twin = Witness(
        vision=(),
        projector=story.parent.projector,
        answer=story.own,
        logits=along(story.model, story.question, story.rows, story.own),
    )
    found = eager_witness(
        story.model, story.question, twin, end_tokens=frozenset(), max_new_tokens=LENGTH + 3
    )
    assert (found.answer, found.free) == (story.own, None)
    np.testing.assert_array_equal(found.leading().logits, twin.logits)


@pytest.mark.parametrize("generates", [True, False])
def test_a_lossy_form_answers_from_its_own_visual_tokens(story: Story, generates: bool) -> None:
    """Its logits are still along the parent's tokens, so that the loss of each part is its own."""
    model = drawn(tiny_spec())
    options = {"vision": {"scheme": "w4a16", "per_channel": True}, "decoder": "w8a16"}
    quantized(model, options, targets=("static",))
    found = eager_witness(
        model,
        story.question,
        story.parent,
        end_tokens=frozenset(),
        max_new_tokens=LENGTH,
        lossy=True,
        generates=generates,
    )
    visual, rows = prompt_of(model, story.question)
    np.testing.assert_array_equal(found.chained[0], visual.numpy())
    np.testing.assert_array_equal(found.fed[0], visual.numpy())
    given = torch.from_numpy(story.parent.projector[0])
    ids = torch.from_numpy(story.question.prompt.token_ids)
    with torch.no_grad():
        beside = model.embed(ids, given)
    want = along(model, story.question, beside, story.parent.answer)
    np.testing.assert_array_equal(found.logits, want)
    assert float((given - visual).abs().max()) > 0.05
    own = along(model, story.question, rows, found.answer)
    np.testing.assert_allclose(found.leading().logits, own, atol=2e-5, rtol=0)
    if generates:
        assert found.answer == greedy(model, story.question, rows, LENGTH)
    else:
        best = tuple(own.argmax(axis=1))
        assert best == found.answer
        assert found.answer[:-1] == story.parent.answer[: len(found.answer) - 1]


def test_both_kinds_of_logits_survive_being_kept(story: Story) -> None:
    kept = [story.witness(), story.witness(generates=False)]
    for before, after in zip(kept, load(save(kept)), strict=True):  # type: ignore[arg-type]
        assert before.answer == after.answer
        np.testing.assert_array_equal(before.logits, after.logits)
        np.testing.assert_array_equal(before.leading().logits, after.leading().logits)
        np.testing.assert_array_equal(before.chained[0], after.chained[0])
