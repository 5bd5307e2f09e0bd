"""A deployment compiler for vision-language models on edge devices and NPUs."""

from edgevlm_runtime._version import __version__

__all__ = ["__version__"]
