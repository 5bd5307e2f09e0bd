"""Text specs from tokenizer and template files, against transformers on the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from edgevlm.errors import ModelError
from edgevlm.families.text_spec import text_spec, tokenizer_json
from edgevlm_runtime.image import ImageLayout
from edgevlm_runtime.text import TextSpec, TileMarks, encode_prompt, load_tokenizer, render
from tests.runtime.templates import ELABORATE, LLAVA, QWEN, SCENES, SMOLVLM, byte_level

REPOSITORY = "\n  hint: take tokenizer.json and config.json from the same checkpoint"
IMAGE = byte_level().token_to_id("<image>")
ASKED = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What's on the 12 mats, été?\n\n"}],
    }
]


def save(folder: Path, template: str | None = SCENES, **config: Any) -> dict[str, bytes]:
    """A folder as `save_pretrained` writes it, then changed; its files by name."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(bos=True),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in saved.items() if value != "absent"}))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read(files: dict[str, bytes], **options: Any) -> TextSpec:
    return text_spec(
        files,
        **{"image_token_id": IMAGE, "expansion": "plain", "positions": "sequential", **options},
    )


@pytest.mark.parametrize("template", [SCENES, LLAVA, SMOLVLM, ELABORATE])
def test_a_saved_folder_renders_as_its_processor_does(template: str, tmp_path: Path) -> None:
    spec = read(save(tmp_path, template))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rendered, _ = render_jinja_template(
        [ASKED],
        chat_template=tokenizer.chat_template,
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )
    assert render(ASKED, spec) == rendered[0]
    assert spec.special == tokenizer.special_tokens_map
    assert (spec.image_token, spec.image_token_id) == ("<image>", IMAGE)


def test_expansion_and_positions_are_the_familys(tmp_path: Path) -> None:
    files = save(tmp_path, QWEN)
    pad = byte_level().token_to_id("<|image_pad|>")
    spec = read(files, image_token_id=pad, expansion="tiled", positions="mrope")
    assert (spec.image_token, spec.tile_marks, spec.positions) == (
        "<|image_pad|>",
        TileMarks(),
        "mrope",
    )


def in_processor(files: dict[str, bytes], template: Any) -> None:
    files["processor_config.json"] = json.dumps({"chat_template": template}).encode()


def in_old_file(files: dict[str, bytes], template: Any) -> None:
    files["chat_template.json"] = json.dumps({"chat_template": template}).encode()


def in_file(files: dict[str, bytes], template: Any) -> None:
    files["chat_template.jinja"] = template.encode()


def in_tokenizer(files: dict[str, bytes], template: Any) -> None:
    config = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = json.dumps({**config, "chat_template": template}).encode()


def test_templates_are_found_in_the_referees_order(tmp_path: Path) -> None:
    """transformers: processor_config.json, chat_template.json, chat_template.jinja."""
    files = save(tmp_path, None)
    places: list[Callable[[dict[str, bytes], Any], None]] = [
        in_tokenizer,
        in_file,
        in_old_file,
        in_processor,
    ]
    for number, place in enumerate(places):
        template = SCENES.replace("<|end|>", f"<|end|>{number}")
        place(files, template)
        assert read(files).chat_template == template


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    files = save(tmp_path, None)
    in_tokenizer(
        files, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SCENES}]
    )
    assert read(files).chat_template == SCENES


def test_marks_of_generation_are_taken_out(tmp_path: Path) -> None:
    template = SCENES.replace(
        "{{ message['content'] }}",
        "{% generation %}\n {{ message['content'] }}{%- endgeneration -%} \n",
    )
    files = save(tmp_path, template)
    messages = [{"role": "user", "content": " hello "}]
    rendered, _ = render_jinja_template([messages], chat_template=template)
    assert render(messages, read(files), add_generation_prompt=False) == rendered[0]


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_the_bundle_gets_the_tokenizer_that_transformers_makes(name: str, tmp_path: Path) -> None:
    """transformers replaces the pre-tokenizer that stands in the file for these classes."""
    files = save(tmp_path, tokenizer_class=name, pad_token="</s>", unk_token="<unk>")
    spec = read(files)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tokenizer_json(tmp_path, spec))
    for words in (
        "What's on the 1234 mats?\n\n  Two cats; e\u0301te\u0301 <|user|> 🐈",
        "a",
        " x  y ",
    ):
        assert ours.encode(words).ids == theirs(words)["input_ids"]
        bare = ours.encode(words, add_special_tokens=False).ids
        assert bare == theirs(words, add_special_tokens=False)["input_ids"]
        assert ours.decode(bare) == theirs.decode(bare, skip_special_tokens=True)
    as_in_file = load_tokenizer(files["tokenizer.json"]).encode("e\u0301 12").ids
    assert (as_in_file == theirs("e\u0301 12")["input_ids"]) == (name != "Qwen2Tokenizer")
    prompt = encode_prompt(ASKED, [ImageLayout(tokens=(3,))], spec, ours)
    assert len(prompt.image_rows) == 3


def test_names_that_transformers_fills_in_must_be_written_down(tmp_path: Path) -> None:
    spec = read(save(tmp_path, tokenizer_class="Qwen2Tokenizer", eos_token="absent"))
    with pytest.raises(ModelError) as caught:
        tokenizer_json(tmp_path, spec)
    assert str(caught.value) == (
        "transformers names the special tokens "
        "{'bos_token': '<s>', 'eos_token': '<|endoftext|>'}, tokenizer_config.json "
        "{'bos_token': '<s>'}\n  hint: write every special token into tokenizer_config.json"
    )


def test_special_tokens_come_from_the_old_file_too(tmp_path: Path) -> None:
    files = save(tmp_path, bos_token="absent")
    files["special_tokens_map.json"] = json.dumps({"bos_token": {"content": "<s>"}}).encode()
    assert read(files).special["bos_token"] == "<s>"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"bos_token": "absent"},
            "the chat template uses bos_token, which tokenizer_config.json does not have\n"
            "  hint: write bos_token into tokenizer_config.json, null if there is none",
        ),
        ({"bos_token": 7}, "tokenizer_config.json: bos_token is 7, expected a text"),
        (
            {"split_special_tokens": True},
            "tokenizer_config.json: split_special_tokens is true, image tokens would not be found\n"
            "  hint: compile a checkpoint without it",
        ),
    ],
)
def test_a_wrong_tokenizer_config_is_an_error(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        read(save(tmp_path, ELABORATE, **config))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            "the checkpoint has no chat template\n"
            "  hint: add a chat_template.jinja, or compile an instruction-tuned checkpoint",
        ),
        ("{% if %}", "chat template: syntax error: unexpected end of block (in <string>:1)"),
        (
            "{% for m in messages %}{{ m.content[1].text }}{% endfor %}",
            "the chat template writes '<image>' 0 times for one picture\n"
            "  hint: compile a checkpoint whose template places pictures",
        ),
        (
            "{% for m in messages %}<image>{% endfor %}",
            "the chat template leaves out the text of message 1",
        ),
    ],
)
def test_a_wrong_template_is_an_error(template: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read(save(tmp_path, template))
    assert str(caught.value) == message


def test_a_template_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    files = {**save(tmp_path, None), "chat_template.jinja": b"\xff"}
    with pytest.raises(ModelError, match=r"^chat_template\.jinja is not UTF-8: "):
        read(files)


def test_the_image_token_must_be_a_token(tmp_path: Path) -> None:
    files = save(tmp_path)
    with pytest.raises(ModelError) as caught:
        read(files, image_token_id=5)
    assert str(caught.value) == (
        "tokenizer.json has no added token of id 5, the model's image token" + REPOSITORY
    )
    files["processor_config.json"] = b'{"image_token": "<img>"}'
    with pytest.raises(ModelError) as caught:
        read(files)
    assert str(caught.value) == (
        f"processor_config.json: image_token is '<img>', the model's image token {IMAGE} is "
        "'<image>'\n  hint: take both files from the same checkpoint"
    )


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    files = save(tmp_path)
    del files["tokenizer_config.json"]
    with pytest.raises(ModelError) as caught:
        read(files)
    assert str(caught.value) == (
        "the checkpoint has no tokenizer_config.json\n"
        "  hint: take it from the checkpoint's own repository"
    )
