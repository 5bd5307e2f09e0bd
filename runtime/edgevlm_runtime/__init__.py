"""Run edgevlm bundles: numpy and an inference engine, no torch."""

from edgevlm_runtime._version import __version__
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.completion import Completion, StreamEvent, Timings
from edgevlm_runtime.decode.protocol import Decoder, Prompt, Step
from edgevlm_runtime.errors import (
    BundleError,
    EdgeVlmError,
    EngineError,
    InputError,
    ResourceError,
)
from edgevlm_runtime.session import Session

__all__ = [
    "Bundle",
    "BundleError",
    "Completion",
    "Decoder",
    "EdgeVlmError",
    "EngineError",
    "InputError",
    "Prompt",
    "ResourceError",
    "Session",
    "Step",
    "StreamEvent",
    "Timings",
    "__version__",
]
