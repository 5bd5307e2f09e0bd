"""Step graphs with stages within the decoder, run by the runtime: the reference's logits.

Every method that cuts in the decoder is compiled for both forms. A prompt with one picture, or two,
goes through the graph of the phase `picture`, the answer through those for tokens, over one state
whose groups have fewer rows the later their layers stand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.edgevlm.reduce.bundled import TARGET_NAMES, Bundled, answered, prompt_of, used_slots
from tests.edgevlm.reduce.deep import asked, deep_stages, skipping
from tests.edgevlm.reduce.reference import Reference

# Logits of size 3 behind up to four layers, float32 against float64.
TOLERANCE = 1e-4
ANSWER = (5, 17, 33, 60)


def one_cut(layer: int = 1, **stage: Any) -> list[dict[str, Any]]:
    """A stage of the decoder."""
    return [{"at": "decoder", "layer": layer, **stage}]


MANY = {"recycle": {"share": 0.8, "per_cluster": 2}}
# Layers of the decoder, its stages, and the budget of those that keep one.
CASES: dict[str, tuple[int, list[dict[str, Any]], float | None]] = {
    "fastv": (2, deep_stages("fastv", [1]), 0.75),
    "feather": (3, deep_stages("feather", [1, 2]), 0.7),
    "pyramiddrop": (4, deep_stages("pyramiddrop", [1, 2, 3]), 0.6),
    "duet": (3, deep_stages("duet", [1, 2]), None),
    # More tokens are recycled than published, so that there are several clusters.
    "sparsevlm": (2, [{**deep_stages("sparsevlm", [1])[0], "rest": MANY}], 0.75),
    "sparsevlm2": (2, deep_stages("sparsevlm2", [1]), 0.75),
    "dart": (2, deep_stages("dart", [1]), 0.75),
    "efficientvla": (2, deep_stages("efficientvla", [1]), 0.75),
    "carve": (2, deep_stages("carve", [1]), 0.75),
    "catp": (2, one_cut(keep=18, score="attention_delta", select="top"), None),
    "p-MoD": (3, [skipping("reweighted", "cosine")], None),
    "VideoLLM-MoD": (3, [skipping("gated", {"every": {"step": 2}}, keep=0.2)], None),
    "all pass, and are weighed": (2, [skipping("gated", "every", keep=36)], None),
    "predicted": (2, one_cut(keep=18, score={"predictor": {"width": 32}}, select="top"), None),
    "nothing taken": (2, one_cut(keep=36, score="random", select="top"), None),
}


@pytest.fixture(scope="module", params=CASES)
def bundled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundled:
    """A method's model and bundle."""
    return Bundled(tmp_path_factory.mktemp("deep") / "bundle", *CASES[request.param])


@pytest.mark.parametrize("num_pictures", [1, 2])
@pytest.mark.parametrize("target", TARGET_NAMES)
def test_a_prompt_and_its_answer(bundled: Bundled, target: str, num_pictures: int) -> None:
    """Token by token, then several at once after a rewind, and another answer on a fork."""
    model = bundled.model
    given = asked(model, num_pictures, answer=ANSWER)
    want = Reference(model).run(given)
    assert want.std() > 0.5
    decoder = bundled.decoder(target)
    got = answered(decoder, given, ANSWER)
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)

    length = given.num_prompt
    first = model.spec.segments[0].tokens
    assert decoder.length == length + len(ANSWER)
    assert used_slots(decoder) == {
        segment.group: length + len(ANSWER) - num_pictures * (first - segment.tokens)
        for segment in model.spec.segments
    }

    decoder.rewind(length + 1)
    fork = decoder.fork()
    got = decoder.extend(ANSWER[1:]).logits
    np.testing.assert_allclose(got, want[2:], atol=TOLERANCE, rtol=0)
    other = (ANSWER[0], 44, 8)
    want = Reference(model).run(asked(model, num_pictures, answer=other))
    got = np.stack([fork.extend([token]).logits[0].copy() for token in other[1:]])
    np.testing.assert_allclose(got, want[2:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_a_second_prompt_after_a_rewind(bundled: Bundled, target: str) -> None:
    """Nothing of the first is left: what it dropped is forgotten with it."""
    model = bundled.model
    decoder = bundled.decoder(target)
    decoder.prefill(prompt_of(asked(model, 2)))
    decoder.rewind(0)
    given = asked(model, 1, answer=ANSWER, seed=5)
    want = Reference(model).run(given)
    got = answered(decoder, given, ANSWER)
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_text_alone_passes_all_layers_whole(bundled: Bundled, target: str) -> None:
    model = bundled.model
    given = asked(model, 0, answer=ANSWER)
    want = Reference(model).run(given)
    decoder = bundled.decoder(target)
    got = answered(decoder, given, ANSWER)
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
    assert set(used_slots(decoder).values()) == {given.num_prompt + len(ANSWER)}
