"""Rewrites of ONNX graphs, one per file, chosen by the target."""
