"""llama.cpp behind a pipe: one line asks for a call, one line says what it took.

`prefill` runs the prompt anew; `step` consumes one token at the position behind the prompt, always
the same one; `generate N` continues greedily from the prompt. Settings are llama.cpp's own, so the
cache is float16. Started by `benchmarks/llama_cpp_loop.py`, in the peer's environment.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np

TO_THE_END = -1
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR, which the package does not name


def main() -> None:
    """Answer commands until there are no more."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("file")
    options.add_argument("--threads", type=int, required=True)
    options.add_argument("--capacity", type=int, required=True)
    arguments = options.parse_args()
    prompt = json.loads(sys.stdin.readline())
    decoder = Decoder(arguments.file, arguments.threads, arguments.capacity)
    for line in sys.stdin:
        command, *count = line.split()
        if command == "step":
            ms = decoder.consume([1], at=len(prompt))
            tokens = [decoder.best()]
        else:
            ms = decoder.consume(prompt, at=0)
            tokens = [decoder.best()]
        if command == "generate":
            started = time.perf_counter()
            for i in range(int(count[0])):
                decoder.consume(tokens[-1:], at=len(prompt) + i)
                tokens.append(decoder.best())
            ms = 1e3 * (time.perf_counter() - started)
        print(json.dumps({"ms": ms, "tokens": tokens}), flush=True)


class Decoder:
    """A model in memory and the cache of one sequence."""

    def __init__(self, file: str, threads: int, capacity: int) -> None:
        """Load the file; the cache has `capacity` slots."""
        llama_cpp.llama_log_set(print_errors, ctypes.c_void_p(None))
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), model_settings)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {file!r}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = capacity
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def consume(self, tokens: Sequence[int], *, at: int) -> float:
        """Forget every position from `at` on and consume tokens there; return milliseconds."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        started = time.perf_counter()
        llama_cpp.llama_memory_seq_rm(self._memory, 0, at, TO_THE_END)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_synchronize(self._context)
        ms = 1e3 * (time.perf_counter() - started)
        if status:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens at {at} returned {status}")
        return ms

    def best(self) -> int:
        """The likeliest token after the last one consumed."""
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._num_tokens,)).argmax())


@llama_cpp.llama_log_callback
def print_errors(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    """Leave out what llama.cpp says of itself, but not its errors."""
    if level == ERROR_LEVEL:
        sys.stderr.write(text.decode())


if __name__ == "__main__":
    main()
