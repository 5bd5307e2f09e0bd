"""Incremental text equals the whole, with characters and stop strings never cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm_runtime.emission import Emission
from tests.runtime.bundles import TOKENIZER

TEXT = st.text(alphabet="ab cé漢🐈\n", max_size=30)


@settings(deadline=None)
@given(TEXT)
def test_pieces_make_the_text(text: str) -> None:
    tokens = TOKENIZER.encode(text).ids
    emission = Emission(TOKENIZER)
    pieces = [emission.push(token) for token in tokens]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + emission.finish(tokens) == text == emission.text


@settings(deadline=None)
@given(TEXT, st.lists(st.text(alphabet="ab c漢", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    """Of `c` and `aca` in `aca`, `c` is complete first."""
    tokens = TOKENIZER.encode(text).ids
    emission = Emission(TOKENIZER, stops)
    said, taken = "", 0
    for token in tokens:
        said += emission.push(token)
        taken += 1
        if emission.stopped:
            break
    said += emission.finish(tokens[:taken])
    wanted, stopped = text, False
    for size in range(len(tokens) + 1):
        so_far = TOKENIZER.decode(tokens[:size]).rstrip("\ufffd")
        places = [so_far.find(stop) for stop in stops if stop in so_far]
        if places:
            wanted, stopped = so_far[: min(places)], True
            break
    assert said == wanted == emission.text
    assert emission.stopped == stopped


def test_half_a_character_comes_out_at_the_end() -> None:
    tokens = TOKENIZER.encode("a漢").ids
    assert len(tokens) == 4
    emission = Emission(TOKENIZER)
    assert [emission.push(token) for token in tokens[:3]] == ["a", "", ""]
    assert emission.finish(tokens[:3]) == "\ufffd"


def test_what_could_become_a_stop_string_is_held_back() -> None:
    emission = Emission(TOKENIZER, ["bcb"])
    tokens = TOKENIZER.encode("abcbcab").ids
    pieces = [emission.push(token) for token in TOKENIZER.encode("abca").ids]
    assert pieces == ["a", "", "", "bca"]
    emission = Emission(TOKENIZER, ["bcb"])
    assert "".join(emission.push(token) for token in tokens[:4]) == "a"
    assert emission.stopped


def test_special_tokens_are_not_text() -> None:
    emission = Emission(TOKENIZER)
    end = TOKENIZER.token_to_id("<|end|>")
    assert emission.push(end) == ""
    assert emission.finish([end]) == ""
