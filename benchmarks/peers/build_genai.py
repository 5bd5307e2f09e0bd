"""onnxruntime-genai's int4 model of our decoder's weights, for `benchmarks/genai_loop.py`.

The model builder needs an environment of its own, whose interpreter is named; the network is not
needed. Default round-to-nearest in groups of 32, symmetric, products in int8 (accuracy level 4),
head and embedding included, which share their weights. Usage:

    python -m venv build/genai-env
    build/genai-env/bin/pip install torch==2.13.0
    build/genai-env/bin/pip install onnxruntime-genai==0.18.0 onnxruntime==1.31.1 \\
        transformers==5.23.0 onnx==1.23.2 onnx-ir==1.1.0
    python benchmarks/peers/build_genai.py recipes/models/smolvlm-500m-shape build/genai-362m \\
        --python build/genai-env/bin/python
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import tempfile
from pathlib import Path

import onnx
from llama_checkpoint import write_llama

OPTIONS = ("accuracy_level=4", "block_size=32", "algo_config=default", "hf_token=false")


def main() -> None:
    """Build the model, and print how often each op is in it."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("checkpoint", type=Path)
    options.add_argument("folder", type=Path)
    options.add_argument("--python", type=Path, required=True, help="interpreter of the peer")
    arguments = options.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        write_llama(arguments.checkpoint, Path(scratch, "llama"))
        # Not resolved: the interpreter of an environment is a link, and is told by where it lies.
        command = [str(arguments.python.absolute()), "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", f"{scratch}/llama", "-o", str(arguments.folder), "-c", f"{scratch}/cache"]
        command += ["-p", "int4", "-e", "cpu", "--extra_options", *OPTIONS]
        subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
    model = onnx.load(arguments.folder / "model.onnx", load_external_data=False)
    for op, count in collections.Counter(node.op_type for node in model.graph.node).most_common():
        print(f"{op:44} {count}")


if __name__ == "__main__":
    main()
