"""Run edgevlm bundles: numpy and an inference engine, no torch."""

from edgevlm_runtime._version import __version__

__all__ = ["__version__"]
