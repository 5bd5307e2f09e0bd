"""Opening and loading checkpoints: what is read, what is refused, and how it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from edgevlm.checkpoint import load, open_checkpoint
from edgevlm.errors import ModelError
from edgevlm.model.loading import reference_weights

COMMIT = "0" * 40
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llava checkpoint, as transformers writes it."""
    torch.manual_seed(0)
    small = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, image_size=16, patch_size=8, **small),
        text_config=LlamaConfig(hidden_size=16, vocab_size=40, **small),
        image_token_index=30,
    )
    folder = tmp_path_factory.mktemp("original")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "<image>": 30}))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit_config(folder: Path, **fields: Any) -> None:
    edit_json(folder / "config.json", lambda config: config.update(fields))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def refusal(folder: Path | str, revision: str | None = None) -> str:
    with pytest.raises(ModelError) as error:
        load(open_checkpoint(str(folder), revision))
    return str(error.value)


def test_weights_go_back_to_transformers(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    model = load(checkpoint)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    weights = checkpoint.family.weights(model.spec)
    ours = dict(reference_weights(model, weights))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    left_out = {name for name in theirs if name not in ours}
    assert left_out == {
        name for name in left_out if ".encoder.layers.1." in name or "post_layernorm" in name
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_become_float32(folder: Path, dtype: torch.dtype) -> None:
    expected: dict[str, torch.Tensor] = {}

    def convert(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            weights[name] = tensor.to(dtype)
        expected[EMBEDDING] = weights[EMBEDDING].float()

    edit_weights(folder, convert)
    embedding = load(open_checkpoint(str(folder))).embedding.weight
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, expected[EMBEDDING])


def test_prefixes_of_every_release_are_one_model(folder: Path) -> None:
    expected = load(open_checkpoint(str(folder))).state_dict()

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            new = name.replace("vision_tower.", "model.vision_tower.vision_model.")
            new = new.replace("language_model.model.", "model.language_model.")
            new = new.replace("language_model.lm_head", "lm_head")
            new = new.replace("multi_modal", "model.multi_modal")
            weights[new] = weights.pop(name)
        weights["model.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)

    edit_weights(folder, rename)
    for name, tensor in load(open_checkpoint(str(folder))).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_shards_are_read_through_their_index(folder: Path) -> None:
    expected = load(open_checkpoint(str(folder))).state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensor in load(open_checkpoint(str(folder))).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    (folder / "b.safetensors").unlink()
    assert refusal(folder) == (
        "model.safetensors.index.json names the shard 'b.safetensors', which is not in "
        f"{folder}\n  hint: download the checkpoint again, all of it"
    )


def test_an_index_cannot_point_outside(folder: Path) -> None:
    index = {"weight_map": {"x": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names the shard '../model.safetensors', which is not in" in refusal(folder)


def test_drawn_weights_are_the_same_each_time_and_of_use(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "random_weights.json").write_text('{"seed": 3}')
    first, second = (load(open_checkpoint(str(folder))) for _ in range(2))
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([1, 30, 30, 30, 30, 5, 6])
    logits = first(first.embed(ids, first.encode(pixels)[0]), torch.arange(7))
    assert logits.std() > 1.0
    other = first(first.embed(ids, first.encode(-pixels)[0]), torch.arange(7))
    assert (logits[0, -1] - other[0, -1]).abs().max() > 0.1


def test_tied_heads_may_be_saved_if_equal(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    assert refusal(folder) == (
        "'language_model.lm_head.weight' differs from the embedding, to which config.json ties it\n"
        "  hint: set tie_word_embeddings to false in config.json"
    )
    edit_weights(
        folder, lambda w: w.update({"language_model.lm_head.weight": w[EMBEDDING].clone()})
    )
    model = load(open_checkpoint(str(folder)))
    assert model.decoder.head.weight is model.embedding.weight


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "missing tensor": (
        lambda w: w.pop("language_model.model.norm.weight"),
        "{folder} lacks the tensor 'model.language_model.norm.weight'\n"
        "  hint: download the checkpoint again, all of it, or take the config that belongs to it",
    ),
    "tensor of nothing": (
        lambda w: w.update({"language_model.model.layers.7.x": torch.ones(1)}),
        "{folder} has the tensor 'language_model.model.layers.7.x', which nothing in the model "
        "takes\n  hint: take the config that belongs to the checkpoint",
    ),
    "wrong shape": (
        lambda w: w.update({"multi_modal_projector.linear_1.bias": torch.ones(17)}),
        "'multi_modal_projector.linear_1.bias' has shape [17], expected [16] by config.json\n"
        "  hint: take the config that belongs to the checkpoint",
    ),
    "wrong shape of one part": (
        lambda w: w.update(
            {"language_model.model.layers.0.self_attn.k_proj.weight": torch.ones(8, 16)}
        ),
        "'language_model.model.layers.0.self_attn.k_proj.weight' has shape [8, 16], expected "
        "[16, 16] by config.json\n  hint: take the config that belongs to the checkpoint",
    ),
    "nan": (
        lambda w: w[EMBEDDING][3].fill_(torch.nan),
        f"{EMBEDDING!r} has a NaN or an infinity in it\n"
        "  hint: the checkpoint is broken: download it again, or train it again",
    ),
    "infinity": (
        lambda w: w["vision_tower.encoder.layers.0.mlp.fc1.bias"][1].fill_(-torch.inf),
        "'vision_tower.encoder.layers.0.mlp.fc1.bias' has a NaN or an infinity in it\n"
        "  hint: the checkpoint is broken: download it again, or train it again",
    ),
    "quantized": (
        lambda w: w.update({EMBEDDING: w[EMBEDDING].to(torch.int8)}),
        f"{EMBEDDING!r} is I8, expected one of F16, BF16, F32, F64\n"
        "  hint: take the checkpoint as it was before it was quantized",
    ),
    "twice": (
        lambda w: w.update({"lm_head.weight": w["language_model.lm_head.weight"].clone()}),
        "'lm_head.weight' and 'language_model.lm_head.weight' are the same weight\n"
        "  hint: save the checkpoint again, with one of them",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_weights_are_refused_by_name(name: str, folder: Path) -> None:
    edit, message = BROKEN[name]
    edit_weights(folder, edit)
    expected = message.format(folder=folder)
    if name == "twice":
        # A shard lists its tensors in no certain order.
        assert sorted(refusal(folder).split()) == sorted(expected.split())
    else:
        assert refusal(folder) == expected


def test_a_truncated_shard_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(folder)
    assert message.startswith("model.safetensors is not a whole safetensors file: ")
    assert message.endswith("\n  hint: download the checkpoint again, all of it")


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, "'auto_map' is {'AutoModel': 'x.Y'}"),
        ("config.json", {"a": [{"trust_remote_code": True}]}, "'a.trust_remote_code' is True"),
        (
            "generation_config.json",
            {"_attn_implementation_internal": "owner/kernel"},
            "'_attn_implementation_internal' is 'owner/kernel'",
        ),
    ],
)
def test_code_is_refused_in_any_config(
    file: str, fields: dict[str, Any], said: str, folder: Path
) -> None:
    edit_json(folder / file, lambda content: content.update(fields))
    assert refusal(folder) == (
        f"{file}: {said}: code and kernels of a checkpoint are not run\n"
        "  hint: compile a checkpoint of a family that edgevlm knows, without this key"
    )


def test_pickles_are_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert refusal(folder) == (
        f"{folder} has its weights in 'pytorch_model.bin', a pickle, which could run any code\n"
        "  hint: save it as safetensors: model.save_pretrained(folder)"
    )
    (folder / "pytorch_model.bin").unlink()
    assert refusal(folder) == (
        f"{folder} has no weights\n"
        "  hint: add model.safetensors, or a random_weights.json with a seed to draw them"
    )


def test_a_folder_of_neither_or_both_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "random_weights.json").write_text('{"seed": 0}')
    assert refusal(folder) == (
        f"{folder} has both random_weights.json and model.safetensors\n"
        "  hint: remove the one that is not meant"
    )
    (folder / "random_weights.json").write_text('{"seed": "x"}')
    assert refusal(folder) == (
        "random_weights.json is {'seed': 'x'}, expected {'seed': N} with N at least 0\n"
        '  hint: write {"seed": 0}'
    )
    (folder / "random_weights.json").unlink()
    (folder / "other.safetensors").write_bytes(b"")
    assert refusal(folder) == (
        f"{folder} has 2 safetensors files and no model.safetensors.index.json\n"
        "  hint: download the checkpoint again, all of it"
    )


def test_tokenizers_larger_than_the_embedding_are_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda content: content["model"]["vocab"].update(c=40))
    with pytest.raises(ModelError) as error:
        open_checkpoint(str(folder)).spec()
    assert str(error.value) == (
        "tokenizer.json has token id 40, and the embedding has 40 rows\n"
        "  hint: take the tokenizer of this checkpoint, or resize the embedding"
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}', '{"added_tokens": [{"x": 1}]}'])
def test_what_is_no_tokenizer_is_refused(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as error:
        open_checkpoint(str(folder)).spec()
    message, hint = str(error.value).splitlines()
    assert message.startswith("tokenizer.json cannot be read: ")
    assert hint == "  hint: take it from the checkpoint's own repository"


def test_a_folder_in_the_place_of_a_file_is_no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert refusal(folder).startswith(f"{folder} has no weights\n")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert refusal(folder).startswith(f"{folder} has no config.json\n")


def test_sources_that_are_no_checkpoint(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("")
    assert refusal(missing) == (
        f"there is no folder {str(missing)!r}\n"
        "  hint: name a folder with a config.json, or a repository of the Hub (owner/name)"
    )
    assert refusal(tmp_path / "file") == (
        f"{str(tmp_path / 'file')!r} is a file, not a folder\n  hint: name the folder it is in"
    )
    assert refusal(empty) == (
        f"{empty} has no config.json\n"
        "  hint: name a checkpoint in Hugging Face form, as save_pretrained writes it"
    )
    (empty / "config.json").write_text("[1]")
    assert refusal(empty) == (
        "config.json is a JSON list, expected an object\n"
        "  hint: take it from the checkpoint's own repository"
    )
    (empty / "config.json").write_text("[" * 100_000)
    assert refusal(empty).startswith("config.json is not JSON: ")
    assert refusal(empty, COMMIT) == (
        f"revision {COMMIT!r} is given, and {str(empty)!r} is a folder\n"
        "  hint: leave the revision out"
    )


@pytest.mark.parametrize(("revision", "said"), [(None, "missing"), ("main", "'main'")])
def test_the_hub_wants_a_commit(revision: str | None, said: str) -> None:
    assert refusal("owner/name", revision) == (
        f"the revision of 'owner/name' is {said}, expected a commit of 40 hexadecimal digits\n"
        "  hint: pin the commit, so that the same recipe is the same model: "
        "https://huggingface.co/owner/name/commits/main shows them"
    )


def test_no_network_is_said_clearly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert refusal("owner/name", COMMIT) == (
        "'owner/name' is not in the local cache, and the Hub cannot be reached\n"
        f"  hint: connect to the network, or run `hf download owner/name --revision {COMMIT}` "
        "elsewhere and give the folder as the model"
    )


def test_a_model_without_layers_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c["text_config"].update(num_hidden_layers=0))
    assert refusal(folder) == (
        "config.json: the decoder has no layers\n"
        "  hint: take it from the checkpoint's own repository"
    )


def test_other_model_types_are_refused(folder: Path) -> None:
    edit_config(folder, model_type="llava_next")
    assert refusal(folder) == (
        "config.json: model_type is 'llava_next', expected one of 'idefics3', 'llava', "
        "'qwen2_5_vl', 'smolvlm'\n"
        "  hint: compile a model of one of these types, or add a file to edgevlm/families"
    )
