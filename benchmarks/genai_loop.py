"""The decoder of onnxruntime-genai's model builder in a bare ONNX Runtime loop, for one process.

Its `model.onnx` runs in the ONNX Runtime that is installed here, beside our graph, so that both
are timed in alternating blocks with the same kernels and threads. State is bound in place, as the
peer's own runtime does; nothing else is done, so this loop is the faster form of that peer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


class GenaiLoop:
    """One prompt, and a step behind it that can be run again and again.

    `prefill` runs the whole prompt; `step` consumes one token at the slot behind the prompt, always
    the same one. `step_logits` [V] and `prompt_logits` [T, V] are what the last of each put out.
    """

    def __init__(
        self,
        folder: Path,
        prompt: NDArray[np.int64],
        *,
        capacity: int,
        options: Mapping[str, str],
        next_token: int = 1,
    ) -> None:
        """Load the folder that the builder wrote; `prompt` are token ids [T], T < capacity.

        `options` are session options, to be the same as those of what it is compared with.
        """
        config = json.loads((folder / "genai_config.json").read_text())["model"]
        decoder = config["decoder"]
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        for name, value in options.items():
            settings.add_session_config_entry(name, value)
        self.session = ort.InferenceSession(
            folder / decoder["filename"], settings, providers=["CPUExecutionProvider"]
        )
        self._inputs, self._outputs = decoder["inputs"], decoder["outputs"]
        self._vocabulary = config["vocab_size"]
        shape = (1, decoder["num_key_value_heads"], capacity, decoder["head_size"])
        self._state = {
            (kind, layer): ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for layer in range(decoder["num_hidden_layers"])
            for kind in ("key", "value")
        }
        self.prefill, self.prompt_logits = self._bound(prompt, used=0)
        self.step, self._step_logits = self._bound(np.array([next_token]), used=len(prompt))
        self.step_logits = self._step_logits[0]

    def _bound(
        self, tokens: NDArray[np.int64], used: int
    ) -> tuple[Callable[[], None], NDArray[np.float32]]:
        """A call of these tokens behind `used` others, and the array [T, V] of its logits."""
        rows = len(tokens)
        names = self._inputs
        arrays = {
            names["input_ids"]: np.ascontiguousarray(tokens[None], np.int64),
            names["attention_mask"]: np.ones((1, used + rows), np.int64),
        }
        if "position_ids" in names:
            arrays[names["position_ids"]] = np.arange(used, used + rows)[None]
        logits = np.zeros((1, rows, self._vocabulary), np.float32)
        binding = self.session.io_binding()
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        # An OrtValue of an array shares its memory, and the binding holds the OrtValue alone.
        kept = (binding, arrays, logits)
        out = ort.OrtValue.ortvalue_from_numpy(logits)
        binding.bind_ortvalue_output(self._outputs["logits"], out)
        for (kind, layer), value in self._state.items():
            binding.bind_ortvalue_input(names[f"past_{kind}_names"] % layer, value)
            binding.bind_ortvalue_output(self._outputs[f"present_{kind}_names"] % layer, value)
        return lambda: self.session.run_with_iobinding(kept[0]), logits[0]
