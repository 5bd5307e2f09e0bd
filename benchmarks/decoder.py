"""The decoder step of a bundle against a bare ONNX Runtime loop on the same graph file.

What bounds a float32 step is reading the weights: 362 M parameters are 1.45 GB. The step's share of
that limit is printed. What the ratio measures is what the runtime adds: filling rotary rows,
sequence lengths and the embedding row, and one Python call. Usage:

    edgevlm compile recipes/smolvlm-500m-shape.yaml -o build/smolvlm-500m-shape
    python benchmarks/decoder.py build/smolvlm-500m-shape --json benchmarks/results/decoder.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from limits import read_bytes_per_ms, weight_bytes
from paired import measure, parser, report

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.protocol import Prompt
from edgevlm_runtime.manifest import GraphSpec
from edgevlm_runtime.session import Session

PROMPT_ROWS = 256


def main() -> None:
    """Measure prefill and step, and print the ratios."""
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    arguments = options.parse_args()
    figures = run(arguments)
    report("decoder", figures, arguments)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Time our decoder and the bare loop, in alternating blocks of steps after one prompt."""
    bundle = Bundle.open(arguments.bundle, "ort")
    decoder = Session(bundle).decoder
    graph = next(graph for graph in bundle.variant.graphs if graph.role == "step")
    width = next(spec.shape[2] for spec in graph.inputs if spec.name == "inputs_embeds")
    assert isinstance(width, int)
    random = np.random.default_rng(0)
    embeds = random.standard_normal((PROMPT_ROWS, width)).astype(np.float32)
    prompt = Prompt(embeds=embeds, positions=np.arange(PROMPT_ROWS), next_position=PROMPT_ROWS)
    bare = BareLoop(arguments.bundle, graph, embeds)

    def prefill() -> None:
        decoder.rewind(0)
        decoder.prefill(prompt)

    prefill()
    bare.prefill()

    def step() -> None:
        decoder.rewind(PROMPT_ROWS)
        decoder.extend([1])

    read_rate = read_bytes_per_ms()
    steps = measure(
        {"ours": step, "bare": bare.step}, blocks=arguments.blocks, repeats=4 * arguments.repeats
    )
    read_rate = max(read_rate, read_bytes_per_ms())
    prefills = measure(
        {"ours": prefill, "bare": bare.prefill}, blocks=max(4, arguments.blocks // 2), repeats=2
    )
    read = weight_bytes(arguments.bundle / graph.file)
    limit_ms = read / read_rate
    return {
        "weight_bytes": read,
        "step_limit_ms": limit_ms,
        "step_share_of_limit": limit_ms / steps.median("bare"),
        "step_ms": steps.median("ours"),
        "bare_step_ms": steps.median("bare"),
        "step_ratio": steps.ratio("ours", "bare"),
        "prefill_256_ms": prefills.median("ours"),
        "bare_prefill_256_ms": prefills.median("bare"),
        "prefill_ratio": prefills.ratio("ours", "bare"),
    }


class BareLoop:
    """The same file in a plain session: state bound in place, nothing else done."""

    def __init__(self, folder: Path, graph: GraphSpec, embeds: np.ndarray) -> None:
        """Load the file with the options that the manifest gives it."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        for name, value in graph.engine.options.items():
            options.add_session_config_entry(name, value)
        self._session = ort.InferenceSession(
            folder / graph.file, options, providers=["CPUExecutionProvider"]
        )
        rope = next(spec.shape for spec in graph.inputs if spec.name == "rope_cos")
        angles = np.zeros(rope, np.float32)
        self._arrays = {"rope_cos": np.cos(angles), "rope_sin": np.sin(angles)}
        self._state = {
            spec.name: ort.OrtValue.ortvalue_from_numpy(np.zeros(spec.shape, np.float32))
            for spec in graph.inputs
            if spec.source.startswith("state:")
        }
        self._present = {
            spec.name: spec.name.replace("present", "past_key_values")
            for spec in graph.outputs
            if spec.name.startswith("present")
        }
        vocabulary = graph.outputs[0].shape[2]
        self._logits = ort.OrtValue.ortvalue_from_numpy(
            np.zeros((1, 1, vocabulary), np.float32)  # type: ignore[arg-type]
        )
        self.prefill = self._bound(embeds[None], used=0)
        self.step = self._bound(embeds[None, :1], used=len(embeds))

    def _bound(self, embeds: np.ndarray, used: int) -> Callable[[], None]:
        rows = embeds.shape[1]
        values = {
            **self._arrays,
            "inputs_embeds": np.ascontiguousarray(embeds),
            "seqlens_k": np.array([used + rows - 1], np.int32),
            "total_sequence_length": np.array(used + rows, np.int32),
            "logit_rows": np.array([rows - 1], np.int64),
        }
        binding = self._session.io_binding()
        for name, array in values.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, value in self._state.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("logits", self._logits)
        for output, past in self._present.items():
            binding.bind_ortvalue_output(output, self._state[past])
        kept = (values, binding)
        return lambda: self._session.run_with_iobinding(kept[1])


if __name__ == "__main__":
    main()
