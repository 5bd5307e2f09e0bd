"""What all tests share."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return Path(__file__).parent.parent


# torch writes thousands of trace records during an export; pytest would format every one of them.
logging.getLogger("torch.__trace").propagate = False
