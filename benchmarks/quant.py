"""Quantized graphs side by side: vision and prompts of integers, a 4-bit step against its peers.

    vision    int8 against our float32 graph, one picture of 1,024 patches
    prompt    256 rows: int8 against the 4-bit kernel of the step, and against float32
    step      4 bits in groups of 32: ours against the model.onnx of onnxruntime-genai in a bare
              loop, and against llama.cpp's Q4_0, on the same weights

All run here in one process, but llama.cpp, which sleeps in its own while others are timed. A figure
comes with what bounds it: operations for vision and prompts, bytes for a step. Usage:

    edgevlm compile recipes/smolvlm-500m-shape.yaml -o build/smolvlm-500m-shape
    edgevlm compile recipes/smolvlm-500m-int8.yaml -o build/smolvlm-500m-int8
    python benchmarks/quant.py build/smolvlm-500m-shape build/smolvlm-500m-int8 \\
        --genai build/genai-362m --llama build/q4_0.gguf --llama-python build/llama-env/bin/python

The peers are built by the scripts in `benchmarks/peers`; without them their rows are left out.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from genai_loop import GenaiLoop
from limits import flops_per_ms, read_bytes_per_ms, weight_bytes
from llama_cpp_loop import LlamaCppLoop
from paired import Timings, measure, parser, report

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import open_decoder
from edgevlm_runtime.decode.protocol import Decoder, Prompt
from edgevlm_runtime.engine import Engines
from edgevlm_runtime.engines.table import open_table
from edgevlm_runtime.manifest import GraphSpec

PROMPT_ROWS, CAPACITY = 256, 1024


def main() -> None:
    """Measure what there is, and print the ratios."""
    options = parser(__doc__)
    options.add_argument("float_bundle", type=Path)
    options.add_argument("bundle", type=Path)
    options.add_argument("--genai", type=Path, help="folder of onnxruntime-genai's model")
    options.add_argument("--llama", type=Path, help="a GGUF file for llama.cpp")
    options.add_argument("--llama-python", type=Path, help="interpreter that has llama_cpp")
    arguments = options.parse_args()
    figures = {
        "instructions": instructions(),
        **vision(arguments),
        **prompts(arguments),
        **steps(arguments),
    }
    report("quant", figures, arguments)


def instructions() -> str:
    """Which of the instructions that decide the speed of integers this processor has."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    return " ".join(name for name in known if name in flags) or platform.machine()


def vision(arguments: argparse.Namespace) -> dict[str, Any]:
    """One picture through both vision graphs, and how far apart their embeddings are."""
    sessions = {
        "float32": open_session(arguments.float_bundle, "vision"),
        "int8": open_session(arguments.bundle, "vision"),
    }
    spec = graph_of(Bundle.open(arguments.bundle, "ort"), "vision")
    shape = [1 if isinstance(size, str) else size for size in spec.inputs[0].shape]
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    runs = {name: runner(session, {"pixels": pixels}) for name, session in sessions.items()}
    want, got = (runs[name]()[0].astype(np.float64).ravel() for name in ("float32", "int8"))
    rate = flops_per_ms()
    timings = measure(runs, blocks=arguments.blocks, repeats=max(2, arguments.repeats // 2))
    noise = float(((want - got) ** 2).sum())
    return {
        "vision_float32_ms": timings.median("float32"),
        "vision_int8_ms": timings.median("int8"),
        "vision_speedup": timings.paired("float32", "int8"),
        "vision_cosine": float(want @ got / np.linalg.norm(want) / np.linalg.norm(got)),
        "vision_sqnr_db": 10 * np.log10(float((want**2).sum()) / noise),
        "float32_products_per_ms": max(rate, flops_per_ms()),
    }


def prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    """A prompt through the int8 graph, the 4-bit step, and the float32 step."""
    ours, float32 = Loop(arguments.bundle), Loop(arguments.float_bundle)
    candidates = {
        "int8": ours.call("prefill", PROMPT_ROWS, 0),
        "int4": ours.call("step", PROMPT_ROWS, 0),
        "float32": float32.call("step", PROMPT_ROWS, 0),
    }
    if arguments.genai is not None:
        candidates["genai"] = genai(arguments).prefill
    timings = measure(candidates, blocks=arguments.blocks, repeats=2)
    return {
        **{f"prompt_{name}_ms": timings.median(name) for name in candidates},
        **{
            f"prompt_speedup_over_{name}": timings.paired(name, "int8")
            for name in candidates
            if name != "int8"
        },
    }


def steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """One token at slot 256: our decoder, a bare loop on our graph, and the peers."""
    decoder = open_bundle_decoder(arguments.bundle)
    width = graph_of(Bundle.open(arguments.bundle, "ort"), "step").inputs[0].shape[2]
    assert isinstance(width, int)
    embeds = np.random.default_rng(0).standard_normal((PROMPT_ROWS, width)).astype(np.float32)
    prompt = Prompt(embeds=embeds, positions=np.arange(PROMPT_ROWS), next_position=PROMPT_ROWS)
    decoder.prefill(prompt)

    def step() -> None:
        decoder.rewind(PROMPT_ROWS)
        decoder.extend([1])

    candidates: dict[str, Callable[[], object]] = {
        "ours": step,
        "bare": Loop(arguments.bundle).call("step", 1, PROMPT_ROWS),
    }
    if arguments.genai is not None:
        candidates["genai"] = genai(arguments).step
    rate = read_bytes_per_ms()
    if arguments.llama is not None:
        with LlamaCppLoop(
            arguments.llama_python,
            arguments.llama,
            list(range(1, PROMPT_ROWS + 1)),
            capacity=CAPACITY,
            threads=len(os.sched_getaffinity(0)),
        ) as loop:
            candidates["llama_cpp"] = loop.step
            timings = timed(candidates, arguments)
    else:
        timings = timed(candidates, arguments)
    read = weight_bytes(arguments.bundle / "ort.step.onnx")
    limit = read / max(rate, read_bytes_per_ms())
    return {
        "step_weight_bytes": read,
        "step_limit_ms": limit,
        "step_share_of_limit": limit / timings.median("ours"),
        **{f"step_{name}_ms": timings.median(name) for name in candidates},
        **{
            f"step_over_{name}": timings.paired("ours", name)
            for name in candidates
            if name != "ours"
        },
    }


def timed(candidates: Mapping[str, Callable[[], object]], arguments: argparse.Namespace) -> Timings:
    """Steps in many short blocks: they are quick, and differ by less than a machine drifts."""
    return measure(candidates, blocks=12 * arguments.blocks, repeats=arguments.repeats)


class Loop:
    """Step graphs of a bundle in plain sessions, their state bound in place."""

    def __init__(self, folder: Path) -> None:
        """Open the bundle; graphs are loaded when they are asked for."""
        self._folder, self._bundle = folder, Bundle.open(folder, "ort")
        self._state: dict[str, ort.OrtValue] = {}

    def call(self, name: str, rows: int, used: int) -> Callable[[], None]:
        """A call of `rows` rows behind `used` others."""
        graph = graph_of(self._bundle, name)
        session = open_session(self._folder, name)
        binding = session.io_binding()
        random = np.random.default_rng(0)
        sizes = {"T": rows, "R": 1}
        arrays = {}
        for spec in graph.inputs:
            shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
            kind = spec.source.partition(":")[0]
            if kind == "state":
                self._state.setdefault(
                    spec.name, ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, spec.dtype))
                )
                binding.bind_ortvalue_input(spec.name, self._state[spec.name])
                continue
            fixed = {"last_slot": used + rows - 1, "total": used + rows, "logit_rows": rows - 1}
            array = np.full(shape, fixed.get(kind, 1), spec.dtype)
            if kind == "embeds":
                array = random.standard_normal(shape).astype(np.float32)
            arrays[spec.name] = array
            binding.bind_ortvalue_input(spec.name, ort.OrtValue.ortvalue_from_numpy(array))
        for spec in graph.outputs:
            past = spec.name.replace("present", "past_key_values")
            if past in self._state:
                binding.bind_ortvalue_output(spec.name, self._state[past])
            else:
                binding.bind_output(spec.name, "cpu")
        kept = (session, binding, arrays)
        return lambda: kept[0].run_with_iobinding(kept[1])


def genai(arguments: argparse.Namespace) -> GenaiLoop:
    """The peer's graph with the options of ours, opened once."""
    known = _OPENED.get("genai")
    if known is None:
        options = graph_of(Bundle.open(arguments.bundle, "ort"), "step").engine.options
        tokens = np.arange(1, PROMPT_ROWS + 1)
        known = GenaiLoop(arguments.genai, tokens, capacity=CAPACITY, options=options)
        known.prefill()
        _OPENED["genai"] = known
    return known


_OPENED: dict[str, GenaiLoop] = {}


def open_bundle_decoder(folder: Path) -> Decoder:
    """The runtime's decoder, without the vision graph."""
    bundle = Bundle.open(folder, "ort")
    table = open_table(bundle, graph_of(bundle, "embedding"))
    return open_decoder(bundle, Engines(bundle), table)


def open_session(folder: Path, name: str) -> ort.InferenceSession:
    """A graph with the options that the manifest gives it."""
    graph = graph_of(Bundle.open(folder, "ort"), name)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in graph.engine.options.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(folder / graph.file, options, providers=["CPUExecutionProvider"])


def graph_of(bundle: Bundle, name: str) -> GraphSpec:
    """The graph of that name."""
    return next(graph for graph in bundle.variant.graphs if graph.name == name)


def runner(
    session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]
) -> Callable[[], list[np.ndarray]]:
    """A call of a session."""
    return lambda: session.run(None, feeds)


if __name__ == "__main__":
    main()
