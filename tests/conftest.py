"""What all tests share."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _torchlib_is_read_once() -> Iterator[None]:
    """Keep what the exporter reads anew for every graph: the sources of its own functions.

    That is half of the time of capturing a small one. Tests that need no torch do without.
    """
    if "torch" not in sys.modules:
        yield
        return
    from torch.onnx._internal.exporter import _registration

    apis = _registration.onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


# torch writes thousands of trace records during an export; pytest would format every one of them.
logging.getLogger("torch.__trace").propagate = False
