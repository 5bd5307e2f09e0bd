"""Run edgevlm bundles: numpy and an inference engine, no torch.

Names are loaded when they are first used, so that a program which only wants the errors or the
manifest types (the compiler's command line) does not wait for numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgevlm_runtime._version import __version__
from edgevlm_runtime.errors import (
    BundleError,
    EdgeVlmError,
    EngineError,
    InputError,
    ResourceError,
)

if TYPE_CHECKING:
    from edgevlm_runtime.bundle import Bundle
    from edgevlm_runtime.completion import Completion, StreamEvent, Timings
    from edgevlm_runtime.decode.protocol import Decoder, Prompt, Step
    from edgevlm_runtime.gate import GatedCompletion, ResolutionGate
    from edgevlm_runtime.session import Session

__all__ = [
    "Bundle",
    "BundleError",
    "Completion",
    "Decoder",
    "EdgeVlmError",
    "EngineError",
    "GatedCompletion",
    "InputError",
    "Prompt",
    "ResolutionGate",
    "ResourceError",
    "Session",
    "Step",
    "StreamEvent",
    "Timings",
    "__version__",
]

_MODULES = {
    "Bundle": "bundle",
    "Completion": "completion",
    "Decoder": "decode.protocol",
    "GatedCompletion": "gate",
    "Prompt": "decode.protocol",
    "ResolutionGate": "gate",
    "Session": "session",
    "Step": "decode.protocol",
    "StreamEvent": "completion",
    "Timings": "completion",
}


def __getattr__(name: str) -> Any:
    """Load a public name."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
