"""ViT-B/16 at 512 x 512: our vision graph against the Hugging Face encoder, exported and fused.

The baseline is transformers' `SiglipVisionModel` with the weights of the same checkpoint, exported
by `torch.onnx` with eager attention and fused by `onnxruntime.transformers.optimizer`. Its "clip"
rules are the only ones that fuse the attention of this export: the others leave a graph half as
slow again. They also replace the tanh form of Gelu by the exact one, hence the distance between the
outputs. Both run in ONNX Runtime with the same options. Ours also does the projector, which is left
out of the timing by cutting both at the encoder's output.

What bounds it is the matrix products: 12 layers at 1,024 rows are 0.21 TFLOP. Usage:

    edgevlm compile recipes/smolvlm-500m-shape.yaml -o build/smolvlm-500m-shape
    python benchmarks/vision.py build/smolvlm-500m-shape recipes/models/smolvlm-500m-shape
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from limits import flops_per_ms, transformer_flops
from onnxruntime.transformers import optimizer
from paired import measure, parser, report
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from edgevlm.checkpoint import open_checkpoint
from edgevlm.evidence.graph import crossing_values
from edgevlm.evidence.referee import reference_model


class Encoder(nn.Module):
    """The encoder of the Hugging Face class, as one function of pixels."""

    def __init__(self, vision: nn.Module) -> None:
        """Hold the encoder."""
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [1, 3, H, W] to features [1, rows, W]."""
        features: Tensor = self.vision(pixel_values=pixels).last_hidden_state
        return features


def main() -> None:
    """Measure both, and print the ratio."""
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("checkpoint", type=Path)
    arguments = options.parse_args()
    report("vision", run(arguments), arguments)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Time our graph and the fused baseline in alternating blocks."""
    with tempfile.TemporaryDirectory(dir=arguments.bundle) as folder:
        baseline = fused_baseline(arguments.checkpoint, Path(folder))
        ours = encoder_alone(arguments.bundle / "ort.vision.onnx", Path(folder))
        sessions = {"ours": open_session(ours), "baseline": open_session(baseline)}
        size = sessions["baseline"].get_inputs()[0].shape[2:]
        pixels = np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32)
        outputs = {
            name: session.run(None, {session.get_inputs()[0].name: pixels})[0]
            for name, session in sessions.items()
        }
        error = float(np.abs(outputs["ours"] - outputs["baseline"]).max())
        rate = flops_per_ms()
        timings = measure(
            {
                name: lambda session=session: session.run(
                    None, {session.get_inputs()[0].name: pixels}
                )
                for name, session in sessions.items()
            },
            blocks=arguments.blocks,
            repeats=max(2, arguments.repeats // 2),
        )
        config = open_checkpoint(str(arguments.checkpoint)).config["vision_config"]
        limit_ms = transformer_flops(
            rows=outputs["ours"].shape[1],
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            inner=config["intermediate_size"],
        ) / max(rate, flops_per_ms())
        return {
            "limit_ms": limit_ms,
            "share_of_limit": limit_ms / timings.median("ours"),
            "ours_ms": timings.median("ours"),
            "baseline_ms": timings.median("baseline"),
            "ratio": timings.ratio("ours", "baseline"),
            "max_error_between_them": error,
            "ours_nodes": len(onnx.load(ours, load_external_data=False).graph.node),
            "baseline_nodes": len(onnx.load(baseline, load_external_data=False).graph.node),
        }


def open_session(path: Path) -> ort.InferenceSession:
    """Open a graph; a session that has run stops spinning, so that the other is not slowed."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def fused_baseline(checkpoint: Path, folder: Path) -> Path:
    """Export the Hugging Face encoder and fuse it."""
    opened = open_checkpoint(str(checkpoint))
    trained = reference_model(opened, opened.architecture()).model.vision_model
    shape = trained.config
    config = SiglipVisionConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_act=shape.hidden_act,
        layer_norm_eps=shape.layer_norm_eps,
        vision_use_head=False,
        attn_implementation="eager",
    )
    siglip = SiglipVisionModel(config)
    siglip.load_state_dict(trained.state_dict())
    encoder = Encoder(siglip).eval()
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    exported, fused = folder / "exported.onnx", folder / "fused.onnx"
    with torch.no_grad():
        torch.onnx.export(encoder, (pixels,), exported, input_names=["pixels"], dynamo=True)
    made = optimizer.optimize_model(
        str(exported),
        model_type="clip",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    num_fused = made.get_fused_operator_statistics()["Attention"]
    if num_fused != config.num_hidden_layers:
        raise RuntimeError(f"the optimizer fused {num_fused} attentions: a baseline too weak")
    made.save_model_to_file(str(fused), use_external_data_format=True)
    return fused


def encoder_alone(path: Path, folder: Path) -> Path:
    """Cut our vision graph at the value that the projector reads."""
    model = onnx.load(path)
    (features,) = crossing_values(model)
    cut = folder / "ours.onnx"
    wanted = onnx.utils.Extractor(model).extract_model(["pixels"], [features])
    onnx.save(wanted, cut, save_as_external_data=True, location="ours.bin")
    return cut


if __name__ == "__main__":
    main()
