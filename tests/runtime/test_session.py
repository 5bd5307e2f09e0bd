"""Sessions: answers, streams, stops, cancelling, owners, and what the two variants agree on."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from edgevlm_runtime import Bundle, InputError, ResourceError, Session
from tests.runtime.bundles import END, TOKENIZER, write_toy
from tests.runtime.toy import PLAIN, Reference, toy_table, toy_weights

PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
QUESTION = "what is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "bundle", max_new_tokens=20)


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return Session(Bundle.open(folder))


def test_greedy_tokens_are_those_of_the_recurrence(session: Session) -> None:
    prompt = session.encode(QUESTION, [PICTURE])
    weights, table, reference = toy_weights(PLAIN, 3), toy_table(), Reference(layers=PLAIN)
    length = len(prompt.embeds)
    logits = reference.call(weights, prompt.embeds, np.arange(length))[0][-1]
    wanted: list[int] = []
    while len(wanted) < 20 and (token := int(logits.argmax())) != END:
        # The choice is clear, so that float32 makes the same.
        assert np.diff(np.sort(logits)[-2:])[0] > 1e-4
        wanted.append(token)
        places = np.array([length + len(wanted) - 1])
        logits = reference.call(weights, table[[token]], places)[0][0]
    assert session.generate(QUESTION, [PICTURE]).tokens == tuple(wanted)


def test_variants_agree(folder: Path, session: Session) -> None:
    static = Session(Bundle.open(folder, "static"))
    for picture in (PICTURE, 255 - PICTURE):
        ours, theirs = session.generate(QUESTION, [picture]), static.generate(QUESTION, [picture])
        assert ours.tokens == theirs.tokens
        assert ours.text == theirs.text


def test_a_stream_is_the_completion_in_pieces(session: Session) -> None:
    events = list(session.stream(QUESTION, [PICTURE]))
    completion = events[-1].completion
    assert completion is not None
    assert [event.completion for event in events[:-1]] == [None] * (len(events) - 1)
    assert "".join(event.text for event in events) == completion.text
    assert completion.text == TOKENIZER.decode(list(completion.tokens))
    assert tuple(event.token for event in events if event.token is not None) == completion.tokens
    elapsed = [event.elapsed_ms for event in events]
    assert elapsed == sorted(elapsed)
    timings = completion.timings
    assert len(timings.token_ms) == len(completion.tokens) - 1
    assert completion.finish_reason == "length"
    total = timings.first_token_ms + sum(timings.token_ms)
    assert 0 < total <= elapsed[-1]
    assert timings.tokens_per_second == pytest.approx(
        1000 * len(timings.token_ms) / sum(timings.token_ms)
    )


def test_the_picture_matters(session: Session) -> None:
    assert (
        session.generate(QUESTION, [PICTURE]).tokens
        != session.generate(QUESTION, [255 - PICTURE]).tokens
    )


def test_end_of_sequence_is_told_and_left_out(folder: Path, tmp_path: Path) -> None:
    session = Session(Bundle.open(folder))
    tokens = session.generate(QUESTION).tokens
    end = tokens[6]
    first = tokens.index(end)
    stopping = write_toy(tmp_path / "b", eos=(end,), max_new_tokens=20)
    events = list(Session(Bundle.open(stopping)).stream(QUESTION))
    completion = events[-1].completion
    assert completion is not None
    assert (completion.tokens, completion.finish_reason) == (tokens[:first], "eos")
    assert events[-1].token is None
    assert completion.text == TOKENIZER.decode(list(tokens[:first]))


def test_limits(session: Session) -> None:
    whole = session.generate(QUESTION, max_new_tokens=60)
    assert whole.finish_reason == "context"
    prompt_rows = len(session.encode(QUESTION).embeds)
    # The last token is drawn from the logits of the last row that fits.
    assert len(whole.tokens) == 64 - prompt_rows + 1
    one = session.generate(QUESTION, max_new_tokens=1)
    assert (one.tokens, one.finish_reason) == (whole.tokens[:1], "length")
    assert one.timings.token_ms == ()
    assert one.timings.tokens_per_second == 0.0


def test_stop_strings_end_the_text(session: Session) -> None:
    text = session.generate(QUESTION, [PICTURE]).text
    stop = text[3:5]
    stopped = session.generate(QUESTION, [PICTURE], stop=["never", stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


def test_sampling_follows_the_seed(session: Session) -> None:
    def drawn(seed: int, **options: float) -> tuple[int, ...]:
        return session.generate(QUESTION, temperature=1.5, seed=seed, **options).tokens  # type: ignore[arg-type]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1, top_k=1) == session.generate(QUESTION).tokens


@pytest.mark.parametrize(("options", "most"), [({}, 28), ({"temperature": 1.0, "top_k": 50}, 32)])
def test_a_token_takes_few_calls(session: Session, options: dict[str, float], most: int) -> None:
    """After a decode step the caches are cold: each call of ours is 2 to 10 us then, each token."""
    calls = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "edgevlm_runtime" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    stream = session.stream(QUESTION, seed=1, **options)  # type: ignore[arg-type]
    for _ in range(4):
        next(stream)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        next(stream)
    finally:
        sys.setprofile(before)
    stream.close()  # type: ignore[attr-defined]
    assert len(calls) <= most, calls


def test_cancel_from_another_thread(session: Session) -> None:
    stream = session.stream(QUESTION, [PICTURE], max_new_tokens=30)
    first = [next(stream) for _ in range(3)]
    threading.Thread(target=session.cancel).start()
    deadline = time.monotonic() + 5
    while not session._cancelled.is_set() and time.monotonic() < deadline:
        time.sleep(0.001)
    rest = list(stream)
    assert len(rest) == 1
    completion = rest[0].completion
    assert completion is not None
    assert completion.finish_reason == "cancelled"
    assert completion.tokens == (*(event.token for event in first), rest[0].token)
    # The next generation begins afresh.
    assert session.generate(QUESTION, [PICTURE], max_new_tokens=4).finish_reason == "length"


def test_cancel_during_the_prompt(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than one call of 12 rows ends after the call in progress."""
    run = session.decoder._run

    def run_and_cancel(*arguments: object) -> object:
        session.cancel()
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(session.decoder, "_run", run_and_cancel)
    completion = session.generate(QUESTION + " and where is the cat, on the mat?", [PICTURE])
    assert (completion.tokens, completion.text) == ((), "")
    assert completion.finish_reason == "cancelled"
    assert session.decoder.length == 12


def test_one_owner_at_a_time(session: Session) -> None:
    stream = session.stream(QUESTION)
    next(stream)
    for use in (lambda: session.generate(QUESTION), lambda: session.encode(QUESTION)):
        with pytest.raises(ResourceError) as error:
            use()
        assert str(error.value) == (
            "this session is in use: a generation is in progress\n"
            "  hint: read its stream to the end or close it, or open a session per thread"
        )
    stream.close()  # type: ignore[attr-defined]
    assert session.generate(QUESTION, max_new_tokens=1).finish_reason == "length"


def test_a_prompt_that_is_too_long_says_by_how_much(session: Session) -> None:
    words = "qz" * 60
    num_rows = len(TOKENIZER.encode("<|user|>" + words + "<|assistant|>").ids)
    with pytest.raises(InputError) as error:
        session.generate(words)
    excess = num_rows - 64
    assert str(error.value) == (
        f"prompt of {num_rows} tokens is {excess} too long: 0 of the 64 tokens of the context are "
        f"used\n  hint: shorten it by {excess} tokens, or compile with a larger context"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0\n  hint: 0 is greedy"),
        (
            {"temperature": float("nan")},
            "temperature must be 0 or more, got nan\n  hint: 0 is greedy",
        ),
        ({"top_k": 0}, "top_k must be at least 1, got 0\n  hint: leave it out for no limit"),
        (
            {"top_p": 1.5},
            "top_p must be above 0 and at most 1, got 1.5\n  hint: leave it out for no limit",
        ),
        (
            {"stop": "end"},
            "stop must be a list of texts that are not empty, got 'end'\n"
            "  hint: leave it out for no stop strings",
        ),
    ],
)
def test_options_without_a_meaning(
    session: Session, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError) as error:
        session.stream(QUESTION, **options)  # type: ignore[arg-type]
    assert str(error.value) == message
