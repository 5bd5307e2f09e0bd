"""Quantization: schemes as data, and the numerics that give a tensor its scales and integers."""
