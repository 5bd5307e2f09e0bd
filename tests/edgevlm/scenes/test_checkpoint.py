"""The shipped checkpoint: stock transformers loads it, and it sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from edgevlm.progress import Silent
from edgevlm.scenes import SPLITS, draw_scene, make_scene, scenes_samples
from edgevlm.scenes.card import CARD_FILE, render_card, render_table
from edgevlm.scenes.evaluate import blanked, evaluate, load_answerer
from edgevlm.scenes.model import build_model, build_processor, save_model
from edgevlm.scenes.tokens import build_tokenizer

SHIPPED = Path(__file__).parents[3] / "recipes" / "models" / "scenes-vlm"
shipped = pytest.mark.skipif(
    not (SHIPPED / "model.safetensors").exists(), reason="the checkpoint is not in this checkout"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    save_model(build_model(tokenizer), build_processor(tokenizer), folder)
    return folder


def _check_stock(folder: Path) -> None:
    """A prompt has 144 image tokens a picture, and stock generation ends in known tokens."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(processor, LlavaProcessor)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.dtype == torch.bfloat16
    assert model.config.text_config.tie_word_embeddings
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    image = draw_scene(make_scene(SPLITS["calibration"].start))
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image},
                {"type": "text", "text": "What is shown?"},
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    text = "<|user|><image>What is shown?<|assistant|>"
    same = processor(images=image, text=text, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], same["input_ids"])
    assert torch.equal(inputs["pixel_values"], same["pixel_values"])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144
    with torch.inference_mode():
        out = model.generate(**inputs.to(dtype=model.dtype), max_new_tokens=3)
    assert inputs["input_ids"].shape[1] < out.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_saved_model_loads_stock(saved: Path) -> None:
    _check_stock(saved)


def test_untrained_model_scores_nothing(saved: Path) -> None:
    """The whole evaluation runs, pairs and turns included, and random weights know nothing."""
    samples = scenes_samples("calibration", 18, 0)
    scores = evaluate(load_answerer(saved, batch=18, progress=Silent()), samples)
    assert scores.mean_accuracy == 0.0
    assert sum(entry.num_samples for entry in scores.tasks) == 18


def test_table() -> None:
    def entry(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "low": 0.5, "high": 0.75, "n": 8}

    scores = {"mean_accuracy": 0.625, "tasks": {"exists": entry(0.625), "box": entry(0.7)}}
    blank = {"mean_accuracy": 0.5, "tasks": {"exists": entry(0.5), "box": entry(0.0)}}
    assert render_table(scores, blank) == (
        "| task | score, % | 95 % interval | grey picture, % | questions |\n"
        "|---|---:|---:|---:|---:|\n"
        "| exists | 62.5 | 50.0 to 75.0 | 50.0 | 8 |\n"
        "| box | 70.0 | 50.0 to 75.0 | 0.0 | 8 |\n"
        "| **mean without box and describe** | **62.5** | | 50.0 | |"
    )


@shipped
def test_shipped_model_loads_stock() -> None:
    _check_stock(SHIPPED)


@shipped
def test_shipped_model_sees() -> None:
    """On samples it was never shown it is far above the same model without sight."""
    samples = scenes_samples("calibration", 90, 0)
    answer = load_answerer(SHIPPED, batch=45, progress=Silent())
    seen = evaluate(answer, samples).mean_accuracy
    guessed = evaluate(answer, [blanked(sample) for sample in samples]).mean_accuracy
    assert seen - guessed > 0.2


@shipped
def test_card_is_rendered_from_its_figures() -> None:
    assert (SHIPPED / CARD_FILE).read_text(encoding="utf-8") == render_card(SHIPPED)
