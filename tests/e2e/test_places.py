"""Bundles whose visual tokens stand elsewhere, or whose pictures are smaller, at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgevlm.cache import StageCache
from edgevlm.compile import Job, compile_recipe
from edgevlm.evidence.fed import inputs_along, visual_of
from edgevlm.evidence.witness import ask
from edgevlm.progress import Silent
from edgevlm.recipe import load_recipe
from edgevlm.samples import Sample
from edgevlm_runtime import Bundle, Session
from edgevlm_runtime.image import FixedGeometry, ImageSpec, prepare
from edgevlm_runtime.text import TextSpec
from tests.e2e.checkpoint import write_recipe

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (120, 90, 3), dtype=np.uint8))
    for seed in range(3)
]
TEXT = [{"type": "text", "text": "How many circles are there?"}]
IMAGE = {"type": "image"}
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "one picture": [{"role": "user", "content": [IMAGE, *TEXT]}],
    "two pictures": [{"role": "user", "content": [IMAGE, IMAGE, *TEXT]}],
    "two turns": [
        {"role": "user", "content": [IMAGE, IMAGE, *TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
        {"role": "user", "content": [IMAGE, *TEXT]},
    ],
    "none": [{"role": "user", "content": TEXT}],
}


def compiled(folder: Path, out: Path, cache: StageCache, *lines: str) -> tuple[Job, Path]:
    """A bundle of a recipe, and the job that made it."""
    evidence = "evidence: {samples: 4, max_new_tokens: 6, reduced: {accuracy_drop: 1.0}}"
    path = write_recipe(folder, "context: {capacity: 640}", *lines, evidence)
    bundle = compile_recipe(load_recipe(path), out, cache=cache)
    return Job(load_recipe(path), cache, Silent()), bundle


def check_prompts(job: Job, bundle: Path, variants: tuple[str, ...]) -> None:
    """The runtime puts every row where our model does, from the same pixels on."""
    model = job.model()
    spec = model.spec
    tokenizer = None
    for variant in variants:
        session = Session(Bundle.open(bundle, variant))
        tokenizer = session.tokenizer
        for messages in PROMPTS.values():
            count = sum(part == IMAGE for message in messages for part in message["content"])
            pictures = PICTURES[:count]
            sample = Sample(
                images=tuple(pictures), messages=tuple(messages), answers=("x",), task="count"
            )
            sections = ImageSpec.from_json(spec.image), TextSpec.from_json(spec.text)
            question = ask(sample, *sections, tokenizer, spec.decoder.rope.num_axes)
            calls = []
            for image in question.images:
                grid = image.layout.grid or spec.vision.grids[0]
                pixels = torch.from_numpy(image.feeds[0]["pixels"])
                pixels = pixels if pixels.ndim == 4 else pixels[None]
                with torch.inference_mode():
                    calls.append((model.visual(pixels, grid), grid))
            fed = inputs_along(model, question, visual_of(model, calls), (1, 1))
            prompt = session.encode(messages, pictures)
            theirs = np.atleast_2d(fed.positions.numpy())
            # The last one is that of the answer's first token.
            np.testing.assert_array_equal(np.atleast_2d(prompt.positions), theirs[:, :-1])
            assert (theirs[:, -1] == prompt.next_position).all()
            np.testing.assert_allclose(
                prompt.embeds, fed.rows[0, :-1].detach().numpy(), atol=2e-4, rtol=0
            )


@pytest.fixture
def folder(workshop: Path, tmp_path: Path) -> Path:
    (tmp_path / "tiny").symlink_to(workshop / "tiny")
    return tmp_path


def test_merged_tokens_with_several_places(folder: Path, cache: StageCache) -> None:
    job, bundle = compiled(
        folder,
        folder / "bundle",
        cache,
        "passes:",
        "  - reduce:",
        "      stages: [{at: projector, keep: 0.6, merge: bipartite}]",
        "      positions: {ppe: {axes: 4}}",
    )
    manifest = Bundle.open(bundle).manifest
    for variant in manifest.variants.values():
        assert variant.rope is not None
        assert variant.rope.sections == (2, 2, 2, 2)
        vision = next(graph for graph in variant.graphs if graph.role == "vision")
        assert [output.name for output in vision.outputs] == ["image_embeds", "image_positions"]
        assert vision.outputs[1].shape[1:] == (86, 4)
    assert (manifest.image["tokens"], manifest.image["spans"]) == ([86], [144.0])
    check_prompts(job, bundle, ("ort", "static"))


def test_smaller_pictures_that_count_by_a_fraction(folder: Path, cache: StageCache) -> None:
    job, bundle = compiled(
        folder,
        folder / "bundle",
        cache,
        "passes:",
        "  - reduce: {method: lowres, keep: 0.25, positions: {v2pe: {step: 0.25}}}",
    )
    manifest = Bundle.open(bundle).manifest
    image = ImageSpec.from_json(manifest.image)
    assert (image.tokens, image.spans) == ((36,), (9.0,))
    assert isinstance(image.geometry, FixedGeometry)
    assert image.geometry.output == (48, 48)
    assert prepare(PICTURES[0], image).feeds[0]["pixels"].shape == (1, 3, 48, 48)
    check_prompts(job, bundle, ("ort", "static"))


def test_patches_that_never_enter(folder: Path, cache: StageCache) -> None:
    job, bundle = compiled(
        folder,
        folder / "bundle",
        cache,
        "targets: [static]",
        "passes:",
        "  - reduce: {method: patchdrop, keep: 0.5}",
    )
    manifest = Bundle.open(bundle).manifest
    assert manifest.image["tokens"] == [72]
    # The picture itself is as large as before.
    assert manifest.image["geometry"] == job._spec.image["geometry"]
    check_prompts(job, bundle, ("static",))


def test_words_of_a_question(folder: Path, cache: StageCache) -> None:
    """The bundle of a method that asks for words says which tokens are none."""
    job, bundle = compiled(
        folder, folder / "bundle", cache, "passes:", "  - reduce: {method: mmtok, keep: 0.25}"
    )
    text = Bundle.open(bundle).manifest.text
    assert {**text, "silent_tokens": []} == {**job.plan.spec.text, "silent_tokens": []}
    session = Session(Bundle.open(bundle))
    silent = {session.tokenizer.id_to_token(token) for token in text["silent_tokens"]}
    assert {"Ġare", "?", "<|assistant|>"} <= silent
    prompt = session.encode(PROMPTS["one picture"], PICTURES[:1])
    words = prompt.row_weights["words"] > 0
    named = [session.tokenizer.id_to_token(token) for token in tokens_of(session, PROMPTS)]
    assert [name for name, asks in zip(named, words[-len(named) :], strict=True) if asks] == [
        "Ġmany",
        "Ġcircles",
    ]


def tokens_of(session: Session, prompts: dict[str, list[dict[str, Any]]]) -> list[int]:
    """The tokens of a question behind its picture."""
    question: str = prompts["none"][0]["content"][0]["text"]
    ids: list[int] = session.tokenizer.encode(f"{question}<|assistant|>").ids
    return ids


def test_places_on_a_grid(root: Path, tmp_path: Path, cache: StageCache) -> None:
    """Three axes: the tokens that are kept stand at their rows and columns."""
    (tmp_path / "tiny").symlink_to(root / "recipes" / "models" / "qwen2_5-vl-tiny")
    job, bundle = compiled(
        tmp_path,
        tmp_path / "bundle",
        cache,
        "targets: [ort]",
        "image: {grids: [[8, 12], [12, 8]]}",
        "passes:",
        "  - reduce: {stages: [{at: projector, keep: 0.5, select: spread}]}",
    )
    image = Bundle.open(bundle).manifest.image
    assert (image["tokens"], image["spans"], image["offsets"]) == ([12, 12], [6.0, 6.0], None)
    check_prompts(job, bundle, ("ort",))
