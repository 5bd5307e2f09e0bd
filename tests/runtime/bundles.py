"""Bundles made by hand for tests: graphs, table and tokenizer, and a manifest over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm_runtime.files import entry_of
from edgevlm_runtime.image import FixedGeometry, ImageSpec
from edgevlm_runtime.manifest import (
    FORMAT_VERSION,
    EngineSpec,
    GenerationSpec,
    GraphSpec,
    Manifest,
    ModelInfo,
    RopeSpec,
    StateGroup,
    TensorSpec,
    Variant,
)
from edgevlm_runtime.structure import to_json
from edgevlm_runtime.text import TextSpec
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.templates import SCENES, byte_level
from tests.runtime.toy import (
    PLAIN,
    ROPE,
    WIDTH,
    delta_graph,
    inplace_graph,
    toy_groups,
    toy_table,
    toy_weights,
)

IMAGE_SIZE, IMAGE_TOKENS = 8, 4
TOKENIZER = byte_level()
END = TOKENIZER.token_to_id("<|end|>")
IMAGE_TOKEN = TOKENIZER.token_to_id("<image>")
CAPACITY = 64


def embedding_graph(folder: Path, table: NDArray[Any]) -> GraphSpec:
    """The token embedding as a table."""
    np.save(folder / "embedding.npy", table, allow_pickle=False)
    return GraphSpec(
        name="embedding",
        role="embedding",
        file="embedding.npy",
        engine=EngineSpec(kind="table"),
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("T",), source="tokens"),),
        outputs=(TensorSpec(name="embeds", dtype="float32", shape=("T", table.shape[1])),),
    )


def vision_weights() -> NDArray[np.float32]:
    """Patches [48] to rows of the decoder's width."""
    weights = np.random.default_rng(11).standard_normal((48, WIDTH)) / 7
    return weights.astype(np.float32)


def vision_graph(folder: Path) -> GraphSpec:
    """Four strips of a picture, each a row."""
    graph = OnnxGraph(folder, "vision", "vision")
    pixels = graph.input("pixels", "float32", (1, 3, IMAGE_SIZE, IMAGE_SIZE), "pixels")
    strips = graph.node("Reshape", pixels, graph.const(np.array([1, IMAGE_TOKENS, 48])))
    rows = graph.node("MatMul", strips, graph.const(vision_weights()))
    graph.output(rows, "image_embeds", "float32", (1, IMAGE_TOKENS, WIDTH))
    return graph.finish()


def write_manifest(
    folder: Path,
    variants: dict[str, Variant],
    *,
    eos: tuple[int, ...] = (END,),
    image: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **generation: Any,
) -> Path:
    """Write the tokenizer, list every file, and write the manifest.

    `image` and `text` are changes to the sections of that name.
    """
    TOKENIZER.save(str(folder / "tokenizer.json"))
    files = {
        path.relative_to(folder).as_posix(): entry_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    images = ImageSpec(
        geometry=FixedGeometry(size=(IMAGE_SIZE, IMAGE_SIZE)),
        resample="nearest",
        rescale=1 / 255,
        mean=None,
        std=None,
        tokens=(IMAGE_TOKENS,),
    )
    prompts = TextSpec(
        chat_template=SCENES, special={}, image_token="<image>", image_token_id=IMAGE_TOKEN
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="toy",
        device="host-cpu",
        model=ModelInfo(name="toy", family="toy", source="tests"),
        variants=variants,
        default_variant=next(iter(variants)),
        image={**images.to_json(), **(image or {})},
        text={**prompts.to_json(), **(text or {})},
        generation=GenerationSpec(eos_token_ids=eos, **generation),
        files=files,
    )
    (folder / "manifest.json").write_text(json.dumps(to_json(manifest), indent=1))
    return folder


def variant_of(
    target: str,
    graphs: tuple[GraphSpec, ...],
    state: tuple[StateGroup, ...],
    rope: RopeSpec | None = ROPE,
) -> Variant:
    """A variant with room for 200 positions."""
    return Variant(target=target, graphs=graphs, state=state, rope=rope, max_positions=200)


def write_toy(folder: Path, *, seed: int = 3, **fields: Any) -> Path:
    """A whole bundle: variant `ort` in place and of any rows, `static` of 1, 4 and 16 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = toy_weights(PLAIN, seed)
    shared = (embedding_graph(folder, toy_table()), vision_graph(folder))
    step = inplace_graph(
        OnnxGraph(folder, "step", "step"),
        PLAIN,
        weights,
        {"main": CAPACITY},
        phases=("prefill", "decode", "verify"),
        max_rows=12,
    )
    statics = tuple(
        delta_graph(
            OnnxGraph(folder, f"step_{rows}", "step"),
            PLAIN,
            weights,
            {"main": CAPACITY},
            rows=rows,
            num_logits=1 if rows == 16 else rows,
            phases=("prefill",) if rows == 16 else ("decode", "verify"),
        )
        for rows in (1, 4, 16)
    )
    variants = {
        "ort": variant_of(
            "ort", (*shared, step), toy_groups(PLAIN, {"main": CAPACITY}, "kv_inplace")
        ),
        "static": variant_of(
            "static", (*shared, *statics), toy_groups(PLAIN, {"main": CAPACITY}, "kv_delta")
        ),
    }
    return write_manifest(folder, variants, **fields)
