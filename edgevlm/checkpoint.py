"""A checkpoint: a folder or a Hugging Face repository, opened without executing anything in it.

Weights are read from safetensors only, and configuration that would run code or load a kernel is
refused by name. Opening reads the small files and no weights, and needs no torch; `load` makes the
model. A folder with `random_weights.json` (`{"seed": 0}`) instead of weights stands for a shape:
its weights are drawn, the same ones each time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.cache import digest, file_digest
from edgevlm.errors import ModelError
from edgevlm.families import Family, family_of
from edgevlm.families.generation import generation_spec
from edgevlm.families.image_spec import ImageChoices, image_spec
from edgevlm.families.text_spec import text_spec
from edgevlm.model.spec import VlmSpec
from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.text import load_tokenizer

if TYPE_CHECKING:
    from edgevlm.model.vlm import Vlm

# What is fetched from the Hub, and all that is read of a folder.
PATTERNS = ("*.safetensors", "*.json", "*.jinja")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INDEX = "model.safetensors.index.json"
RANDOM = "random_weights.json"

# Keys that make transformers run code of the repository, or fetch a kernel.
CODE_KEYS = re.compile(r"auto_map|trust_remote_code|_?(attn|experts)_implementation.*")
HARMLESS_KEYS = frozenset({"_attn_implementation_autoset"})

OWN_REPOSITORY = "take it from the checkpoint's own repository"

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What was opened: `files` are its small files by name, `shards` its weight files.

    `seed` is set where weights are drawn; there are no shards then.
    """

    source: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    shards: tuple[Path, ...]
    seed: int | None = None

    @property
    def family(self) -> Family:
        """The family of the config's `model_type`."""
        return family_of(self.config.get("model_type"))

    def architecture(self, choices: ImageChoices | None = None) -> VlmSpec:
        """The spec of the model alone, without what a processor and a tokenizer say."""
        spec = self.family.spec(self.config, self.files, choices or ImageChoices())
        for name, part in (("vision encoder", spec.vision), ("decoder", spec.decoder)):
            if not part.layers:
                raise ModelError(f"config.json: the {name} has no layers", hint=OWN_REPOSITORY)
        return spec

    def spec(self, choices: ImageChoices | None = None) -> VlmSpec:
        """The spec of the model, its pictures, its prompts and its generation."""
        choices = choices or ImageChoices()
        family, spec = self.family, self.architecture(choices)
        self._check_tokenizer(spec)
        native, grid = spec.vision.position == "rotary", spec.vision.grids[0]
        image = image_spec(
            self.files,
            family=spec.family,
            tokens=None if native else spec.image_tokens(grid),
            size=None if native else spec.vision.pixels_shape(grid)[1:],
            choices=choices,
        )
        text = text_spec(
            self.files,
            image_token_id=spec.image_token_id,
            expansion=family.EXPANSION,
            positions=family.POSITIONS,
        )
        generation, notes = generation_spec(self.config, self.json("generation_config.json"))
        return replace(
            spec, image=image.to_json(), text=text.to_json(), generation=generation, notes=notes
        )

    def json(self, name: str) -> dict[str, Any] | None:
        """One of the small files, or None where it is absent."""
        return _parse(name, self.files[name]) if name in self.files else None

    def content_key(self) -> str:
        """Hash of all that is read of the checkpoint, every weight included."""
        shards = {shard.name: file_digest(shard) for shard in self.shards}
        return digest(self.files, shards)

    def _check_tokenizer(self, spec: VlmSpec) -> None:
        """Refuse a tokenizer that is none, or with more tokens than the embedding has rows."""
        if "tokenizer.json" not in self.files:
            raise ModelError(
                f"{self.source} has no tokenizer.json",
                hint="save a fast tokenizer beside the model: tokenizer.save_pretrained(folder)",
            )
        try:
            tokenizer = load_tokenizer(self.files["tokenizer.json"])
        except BundleError as error:
            raise ModelError(error.message, hint=OWN_REPOSITORY) from error
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        num_rows = spec.decoder.vocab_size
        if largest >= num_rows:
            raise ModelError(
                f"tokenizer.json has token id {largest}, and the embedding has {num_rows} rows",
                hint="take the tokenizer of this checkpoint, or resize the embedding",
            )
        if spec.image_token_id >= num_rows:
            raise ModelError(
                f"config.json: the image token's id is {spec.image_token_id}, and the embedding "
                f"has {num_rows} rows",
                hint="take config.json from the checkpoint's own repository",
            )


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Open a folder, or a repository of the Hub at a commit."""
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                f"revision {revision!r} is given, and {source!r} is a folder",
                hint="leave the revision out",
            )
    elif folder.exists():
        raise ModelError(f"{source!r} is a file, not a folder", hint="name the folder it is in")
    elif HUB_ID.fullmatch(source):
        folder = _download(source, revision)
    else:
        raise ModelError(
            f"there is no folder {source!r}",
            hint="name a folder with a config.json, or a repository of the Hub (owner/name)",
        )
    files = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".jinja")
        and path.is_file()
        and not path.name.endswith(".index.json")
    }
    if "config.json" not in files:
        raise ModelError(
            f"{source} has no config.json",
            hint="name a checkpoint in Hugging Face form, as save_pretrained writes it",
        )
    for name, content in files.items():
        if name.endswith("config.json"):
            _refuse_code(name, _parse(name, content))
    seed = _seed(files)
    return Checkpoint(
        source=source,
        revision=revision,
        folder=folder,
        config=_parse("config.json", files["config.json"]),
        files=files,
        shards=_shards(folder, source, drawn=seed is not None),
        seed=seed,
    )


def load(checkpoint: Checkpoint, spec: VlmSpec | None = None) -> Vlm:
    """The model in float32, its weights streamed from the shards (or drawn)."""
    from edgevlm.model.loading import load_model

    return load_model(checkpoint, spec or checkpoint.architecture())


def _download(source: str, revision: str | None) -> Path:
    """Fetch a commit of a repository into the Hub's cache, or find it there."""
    if revision is None or not COMMIT.fullmatch(revision):
        got = "missing" if revision is None else f"{revision!r}"
        raise ModelError(
            f"the revision of {source!r} is {got}, expected a commit of 40 hexadecimal digits",
            hint="pin the commit, so that the same recipe is the same model: "
            f"https://huggingface.co/{source}/commits/main shows them",
        )
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever httpx it is

    # Asked once, because a download retries for half a minute before it gives up.
    try:
        HfApi().repo_info(source, revision=revision, timeout=10)
        reachable = True
    except (httpx.TransportError, errors.OfflineModeIsEnabled):
        reachable = False
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{source!r} is gated, and this account has no access to it",
            hint=f"ask for access at https://huggingface.co/{source}, then `hf auth login`",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelError(
            f"the Hub has no {source!r} at commit {revision}",
            hint="check the name and the commit; a private repository needs `hf auth login`",
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelError(
            f"the Hub does not give {source!r}: {str(error).splitlines()[0]}", hint="try again"
        ) from error
    try:
        folder = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(PATTERNS),
            local_files_only=not reachable,
        )
    except (errors.LocalEntryNotFoundError, httpx.TransportError) as error:
        raise ModelError(
            f"{source!r} is not in the local cache, and the Hub cannot be reached",
            hint=f"connect to the network, or run `hf download {source} --revision {revision}` "
            "elsewhere and give the folder as the model",
        ) from error
    return Path(folder)


def _parse(name: str, content: bytes) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not JSON: {error}", hint=OWN_REPOSITORY) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{name} is a JSON {type(value).__name__}, expected an object",
            hint=OWN_REPOSITORY,
        )
    return value


def _refuse_code(name: str, config: Mapping[str, Any]) -> None:
    """Refuse keys that ask for code or kernels of the repository."""
    for path, value in _walk(config):
        key = path.rpartition(".")[2]
        if CODE_KEYS.fullmatch(key) and key not in HARMLESS_KEYS and value is not None:
            raise ModelError(
                f"{name}: {path!r} is {value!r}: code and kernels of a checkpoint are not run",
                hint="compile a checkpoint of a family that edgevlm knows, without this key",
            )


def _walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every key of nested objects, with its dotted path."""
    if isinstance(value, list):
        for item in value:
            yield from _walk(item, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = f"{path}.{key}" if path else str(key)
            yield inner, item
            yield from _walk(item, inner)


def _seed(files: Mapping[str, bytes]) -> int | None:
    """The seed of drawn weights, where the checkpoint is a shape."""
    if RANDOM not in files:
        return None
    content = _parse(RANDOM, files[RANDOM])
    seed = content.get("seed")
    if set(content) != {"seed"} or type(seed) is not int or seed < 0:
        raise ModelError(
            f"{RANDOM} is {content!r}, expected {{'seed': N}} with N at least 0",
            hint='write {"seed": 0}',
        )
    return seed


def _shards(folder: Path, source: str, *, drawn: bool) -> tuple[Path, ...]:
    """The weight files, all of them there."""
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if drawn:
        if found:
            raise ModelError(
                f"{source} has both {RANDOM} and {found[0].name}",
                hint="remove the one that is not meant",
            )
        return ()
    if (folder / INDEX).exists():
        named = _parse(INDEX, (folder / INDEX).read_bytes()).get("weight_map")
        if not isinstance(named, dict):
            raise ModelError(
                f"{INDEX} has no 'weight_map'",
                hint=OWN_REPOSITORY,
            )
        names = sorted({str(name) for name in named.values()})
        for name in names:
            if Path(name).name != name or folder / name not in found:
                raise ModelError(
                    f"{INDEX} names the shard {name!r}, which is not in {source}",
                    hint="download the checkpoint again, all of it",
                )
        return tuple(folder / name for name in names)
    if len(found) == 1:
        return tuple(found)
    if found:
        raise ModelError(
            f"{source} has {len(found)} safetensors files and no {INDEX}",
            hint="download the checkpoint again, all of it",
        )
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{source} has its weights in {pickles[0]!r}, a pickle, which could run any code",
            hint="save it as safetensors: model.save_pretrained(folder)",
        )
    raise ModelError(
        f"{source} has no weights",
        hint=f"add model.safetensors, or a {RANDOM} with a seed to draw them",
    )
