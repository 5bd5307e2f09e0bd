"""Lowering: a torch module becomes an ONNX graph, and the graph takes the form its target runs."""
