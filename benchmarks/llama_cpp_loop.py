"""llama.cpp's decoder on the same weights, as calls that `paired.measure` can put beside ours.

It runs in a process of its own, from its own environment, and sleeps while ours is timed. A call
costs a line each way through a pipe, 0.05 ms, which the time that it reports leaves out. Build its
file with `benchmarks/peers/build_gguf.py`. Alone, it prints what a prompt of 256 and 64 tokens
after it take. Usage:

    python benchmarks/llama_cpp_loop.py build/q4_0.gguf --python build/llama-cpp-env/bin/python
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from paired import measure, parser, report

WORKER = Path(__file__).parent / "peers" / "llama_cpp_worker.py"
PROMPT_ROWS, NEW_TOKENS = 256, 64


class LlamaCppLoop:
    """One prompt in a llama.cpp process, and a step behind it that can be run again and again."""

    def __init__(
        self, python: Path, file: Path, prompt: Sequence[int], *, capacity: int, threads: int
    ) -> None:
        """Start the process and load the file; `prompt` are token ids."""
        command = [str(python.absolute()), str(WORKER), str(file)]
        command += ["--threads", str(threads), "--capacity", str(capacity)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._send(json.dumps([int(token) for token in prompt]))
        self.prefill()

    def prefill(self) -> float:
        """Run the prompt anew; milliseconds, as the process measured them."""
        return self._call("prefill")

    def step(self) -> float:
        """Consume one token behind the prompt; milliseconds, as the process measured them."""
        return self._call("step")

    def generate(self, count: int) -> float:
        """Continue greedily from the prompt; milliseconds of the tokens after the first."""
        return self._call(f"generate {count}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> LlamaCppLoop:
        """Return the loop itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

    def _call(self, command: str) -> float:
        self._send(command)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}")
        answer = json.loads(line)
        self.tokens: list[int] = answer["tokens"]
        return float(answer["ms"])

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")


def main() -> None:
    """Time a prompt of 256 and 64 tokens after it."""
    options = parser(__doc__)
    options.add_argument("file", type=Path)
    options.add_argument("--python", type=Path, required=True, help="interpreter of the peer")
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = options.parse_args()
    prompt = np.random.default_rng(0).integers(0, 1000, PROMPT_ROWS).tolist()
    with LlamaCppLoop(
        arguments.python, arguments.file, prompt, capacity=1024, threads=arguments.threads
    ) as loop:
        timings = measure(
            {"prefill": loop.prefill, "step": loop.step},
            blocks=arguments.blocks,
            repeats=arguments.repeats,
        )
        generated = [loop.generate(NEW_TOKENS) / NEW_TOKENS for _ in range(arguments.repeats)]
    figures = {
        "prefill_256_ms": timings.median("prefill"),
        "step_ms": timings.median("step"),
        "generated_64_ms_per_token": float(np.median(generated)),
    }
    report("llama_cpp", figures, arguments)


if __name__ == "__main__":
    main()
