"""Prompts are transformers' own: rendered text, token ids, and M-RoPE positions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string
from transformers.utils.chat_template_utils import render_jinja_template

from edgevlm_runtime.errors import InputError
from edgevlm_runtime.image import ImageLayout, ImageSpec, NativeGeometry, TiledGeometry, prepare
from edgevlm_runtime.text import (
    Message,
    TextSpec,
    TileMarks,
    encode_prompt,
    render,
    user_message,
)
from tests.runtime.templates import ELABORATE, LLAVA, QWEN, SCENES, SMOLVLM, byte_level

IMAGE = {"type": "image"}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> Message:
    return {"role": "user", "content": list(parts)}


def assistant(words: str) -> Message:
    return {"role": "assistant", "content": [text(words)]}


CONVERSATIONS: list[list[Message]] = [
    [user(IMAGE, text("what is in the picture?"))],
    [user(text("what is in the picture?"))],
    [user(text("a <b>&amp; 'cat' é漢字 🐈 {{ x }}\n\n  on\tthe mat "), IMAGE)],
    [user(IMAGE, IMAGE, text("which?")), assistant("the first"), user(text("and now?"), IMAGE)],
    [{"role": "system", "content": [text("Be brief.")]}, user(IMAGE, text("what?"))],
    [user(IMAGE, text("where?")), assistant("on the mat"), user(text("sure?")), assistant("yes")],
]


def spec(template: str, **fields: Any) -> TextSpec:
    tokenizer = byte_level()
    token = fields.pop("image_token", "<image>")
    return TextSpec(
        chat_template=template,
        special=SPECIAL,
        image_token=token,
        image_token_id=tokenizer.token_to_id(token),
        **fields,
    )


def flat(*counts: int) -> list[ImageLayout]:
    return [ImageLayout(tokens=(count,)) for count in counts]


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [SCENES, LLAVA, SMOLVLM, QWEN, ELABORATE])
def test_rendering_is_the_referees(template: str, messages: list[Message], generate: bool) -> None:
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=generate, **SPECIAL
    )
    image_token = "<|image_pad|>" if template is QWEN else "<image>"
    ours = render(messages, spec(template, image_token=image_token), add_generation_prompt=generate)
    assert ours == rendered[0]


@pytest.mark.parametrize("template", [SCENES, QWEN, ELABORATE])
def test_plain_contents_render_as_the_referees(template: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **SPECIAL
    )
    assert render(messages, spec(template)) == rendered[0]


@pytest.mark.parametrize("template", [LLAVA, SMOLVLM])
def test_a_template_of_parts_gets_parts(template: str) -> None:
    """The referee drops a plain content here without a word."""
    plain = [{"role": "user", "content": "hello"}]
    assert render(plain, spec(template)) == render([user(text("hello"))], spec(template))
    assert "hello" in render(plain, spec(template))


def test_a_text_that_the_template_drops_is_an_error() -> None:
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "a b"}]
    with pytest.raises(InputError) as caught:
        render(messages, spec(template))
    assert str(caught.value) == "the chat template leaves out the text of message 1"


def test_a_template_refuses_with_its_own_words() -> None:
    messages = [user(text("a")), {"role": "system", "content": "b"}]
    with pytest.raises(InputError) as caught:
        render(messages, spec(ELABORATE))
    assert str(caught.value) == (
        "the chat template refuses these messages: only user and assistant take turns, got system"
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [LLAVA, SCENES, ELABORATE])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_llava_token_ids_are_the_referees(
    messages: list[Message], template: str, bos: bool
) -> None:
    tokenizer = byte_level(bos=bos)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
        ),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    pictures, theirs = referee_messages(messages, (40, 30))
    ids = processor.apply_chat_template(
        theirs, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    prompt = encode_prompt(messages, flat(*[16] * len(pictures)), spec(template), tokenizer)
    assert prompt.token_ids.tolist() == list(ids)
    assert prompt.positions.tolist() == list(range(len(ids)))
    assert prompt.next_position == len(ids)
    image = tokenizer.token_to_id("<image>")
    assert prompt.image_rows.tolist() == [i for i, token in enumerate(ids) if token == image]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (96, 40), (40, 96), (32, 32)])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_idefics3_token_ids_are_the_referees(
    messages: list[Message], size: tuple[int, int], split: bool
) -> None:
    tokenizer = byte_level()
    image_spec = ImageSpec(
        geometry=TiledGeometry(longest_edge=96, tile=32, split=split),
        resample="lanczos",
        rescale=1 / 255,
        mean=None,
        std=None,
        tokens=(5,),
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 96}, max_image_size={"longest_edge": 32}, do_image_splitting=split
        ),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer),
        image_seq_len=5,
        chat_template=SMOLVLM,
    )
    pictures, theirs = referee_messages(messages, size)
    ids = processor.apply_chat_template(
        theirs, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    layouts = [prepare(picture, image_spec).layout for picture in pictures]
    prompt = encode_prompt(messages, layouts, spec(SMOLVLM, tile_marks=TileMarks()), tokenizer)
    assert prompt.token_ids.tolist() == list(ids)
    assert len(prompt.image_rows) == sum(layout.num_tokens for layout in layouts)


def test_smolvlm_writes_what_the_referee_writes() -> None:
    tokenizer = byte_level()
    layouts = [ImageLayout(tokens=(3,) * 7, tiles=(2, 3)), ImageLayout(tokens=(3,))]
    prompt = encode_prompt(
        [user(IMAGE, text("a"), IMAGE)], layouts, spec(SMOLVLM, tile_marks=TileMarks()), tokenizer
    )
    first, second = (
        get_image_prompt_string(
            *layout.tiles,
            3,
            fake_token_around_image="<fake_token_around_image>",
            image_token="<image>",
            global_image_token="<global-img>",
        )
        for layout in layouts
    )
    whole = f"<|im_start|>User:{first}a{second}<end_of_utterance>\nAssistant:"
    assert prompt.token_ids.tolist() == tokenizer.encode(whole).ids


@pytest.fixture(scope="module")
def qwen() -> Qwen2_5_VLModel:
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 512,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32},
    )
    with torch.device("meta"):
        return Qwen2_5_VLModel(config)


@pytest.mark.parametrize("sizes", [(280, 112), (112, 280), (140, 140), (28, 28)])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_qwen_tokens_and_positions_are_the_referees(
    qwen: Qwen2_5_VLModel, messages: list[Message], sizes: tuple[int, int]
) -> None:
    tokenizer = byte_level()
    referee = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 784 * 100})
    pictures, theirs = referee_messages(messages, sizes)
    # Pictures of one prompt differ, so that their order counts.
    pictures = [picture.resize((sizes[0], sizes[1] + 28 * i)) for i, picture in enumerate(pictures)]
    grids = [referee(picture)["image_grid_thw"][0].tolist() for picture in pictures]
    layouts = [prepare(picture, qwen_image_spec(grids)).layout for picture in pictures]

    rendered, _ = render_jinja_template([theirs], chat_template=QWEN, add_generation_prompt=True)
    whole = rendered[0]
    for grid in grids:
        whole = whole.replace("<|image_pad|>", "<pad>" * (grid[1] * grid[2] // 4), 1)
    ids = tokenizer.encode(whole.replace("<pad>", "<|image_pad|>")).ids

    text_spec = spec(QWEN, image_token="<|image_pad|>", positions="mrope")
    prompt = encode_prompt(messages, layouts, text_spec, tokenizer)
    assert prompt.token_ids.tolist() == ids

    token_ids = torch.tensor([ids])
    positions, delta = qwen.get_rope_index(
        token_ids,
        (token_ids == text_spec.image_token_id).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    assert prompt.positions.tolist() == positions[:, 0].tolist()
    # The referee goes on at the length of the prompt plus delta.
    assert prompt.next_position == len(ids) + int(delta)


def qwen_image_spec(grids: list[list[int]]) -> ImageSpec:
    return ImageSpec(
        geometry=NativeGeometry(
            patch=14,
            merge=2,
            temporal_patch=2,
            min_pixels=28 * 28,
            max_pixels=784 * 100,
            grids=tuple((grid[1], grid[2]) for grid in grids),
        ),
        resample="bicubic",
        rescale=1 / 255,
        mean=None,
        std=None,
        tokens=tuple(grid[1] * grid[2] // 4 for grid in grids),
    )


def referee_messages(
    messages: list[Message], size: tuple[int, int]
) -> tuple[list[Image.Image], list[Any]]:
    """The same messages with a picture in every image part, as transformers takes them."""
    pictures: list[Image.Image] = []
    theirs = json.loads(json.dumps(messages))
    for message in theirs:
        for part in message["content"]:
            if part["type"] == "image":
                pictures.append(Image.new("RGB", size, (len(pictures), 0, 0)))
                part["image"] = pictures[-1]
    return pictures, theirs


def test_a_string_is_one_user_message_pictures_first() -> None:
    tokenizer = byte_level()
    assert user_message("what?", 2) == [user(IMAGE, IMAGE, text("what?"))]
    ours = encode_prompt("what?", flat(2, 3), spec(SCENES), tokenizer)
    same = encode_prompt([user(IMAGE, IMAGE, text("what?"))], flat(2, 3), spec(SCENES), tokenizer)
    assert ours.token_ids.tolist() == same.token_ids.tolist()


def test_the_spec_survives_json() -> None:
    for one in (spec(SCENES), spec(SMOLVLM, tile_marks=TileMarks(whole="<whole>"))):
        assert TextSpec.from_json(json.loads(json.dumps(one.to_json()))) == one
