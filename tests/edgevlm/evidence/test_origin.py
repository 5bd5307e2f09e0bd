"""Where our model parts from the Hugging Face class: a planted fault is found at its site."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgevlm.checkpoint import Checkpoint, load, open_checkpoint
from edgevlm.evidence.origin import find_origin
from edgevlm.evidence.witness import Question, ask
from edgevlm.families.image_spec import ImageChoices
from edgevlm.families.text_spec import tokenizer_json
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.samples import draw_samples
from edgevlm_runtime.images.spec import ImageSpec
from edgevlm_runtime.text import TextSpec, load_tokenizer
from tests.e2e.checkpoint import save_tiny_checkpoint


def llava(root: Path, folder: Path) -> Path:
    return save_tiny_checkpoint(folder)


def qwen(root: Path, folder: Path) -> Path:
    return root / "recipes" / "models" / "qwen2_5-vl-tiny"


def smolvlm(root: Path, folder: Path) -> Path:
    """SmolVLM shrunk: every picture becomes 2 x 2 tiles of 128 pixels and the whole."""
    shutil.copytree(root / "recipes" / "models" / "smolvlm-500m-shape", folder)
    layers = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80}
    heads = {"num_attention_heads": 3}
    edit(folder / "config.json", vision_config={**layers, **heads, "image_size": 128})
    edit(
        folder / "config.json",
        text_config={**layers, **heads, "num_key_value_heads": 1, "head_dim": 16},
    )
    edit(
        folder / "preprocessor_config.json",
        max_image_size={"longest_edge": 128},
        size={"longest_edge": 256},
    )
    edit(folder / "processor_config.json", image_seq_len=4)
    return folder


def edit(path: Path, **sections: object) -> None:
    content = json.loads(path.read_text())
    for name, value in sections.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


def asked(checkpoint: Checkpoint, spec: VlmSpec) -> Question:
    """The first sample of the calibration split."""
    text = TextSpec.from_json(spec.text)
    (sample,) = draw_samples(None, split="calibration", count=1, seed=0)
    tokenizer = load_tokenizer(tokenizer_json(checkpoint.folder, text))
    return ask(sample, ImageSpec.from_json(spec.image), text, tokenizer)


CASES: dict[str, tuple[Callable[[Path, Path], Path], ImageChoices, int]] = {
    "llava": (llava, ImageChoices(), 1),
    # The order of rows differs between the two sides up to the merger.
    "qwen2_5_vl": (qwen, ImageChoices(grids=((8, 8),)), 1),
    # Ours encodes tile by tile, transformers all tiles at once.
    "smolvlm, split": (smolvlm, ImageChoices(split=True), 5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_found_at_its_site(
    case: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, choices, num_calls = CASES[case]
    checkpoint = open_checkpoint(str(make(root, tmp_path / "model")))
    spec = checkpoint.spec(choices)
    question = asked(checkpoint, spec)
    assert len(question.feeds) == num_calls
    assert find_origin(checkpoint, spec, question) is None

    for site, before in (
        ("vision.layers.1.norm2", "vision.layers.1.attention.out"),
        ("decoder.layers.0.mlp.down", "decoder.layers.0.mlp.up"),
    ):
        # Looked up where `find_origin` loads our side; the referee has its own.
        monkeypatch.setattr("edgevlm.evidence.origin.load", _louder(site))
        found = find_origin(checkpoint, spec, question)
        assert found is not None
        assert (found.site, found.before) == (site, before)


def _louder(site: str) -> Callable[[Checkpoint, VlmSpec], Vlm]:
    def load_broken(checkpoint: Checkpoint, spec: VlmSpec) -> Vlm:
        model = load(checkpoint, spec)
        weight = model.get_submodule(site).weight
        with torch.no_grad():
            weight.mul_(1.5)
        return model

    return load_broken
