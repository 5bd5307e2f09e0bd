"""A bundle: a directory that one manifest describes, every byte checked before it is used."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from edgevlm_runtime.manifest import Manifest, Variant


class Bundle:
    """An opened bundle: its manifest, the variant in use, its verified files."""

    path: Path
    manifest: Manifest
    variant_name: str
    variant: Variant

    @classmethod
    def open(cls, path: str | PathLike[str], variant: str | None = None) -> Bundle:
        """Read the manifest, check sha256 and size of every listed file, choose a variant."""
        raise NotImplementedError

    def file(self, name: str) -> memoryview:
        """The verified bytes of a listed file, memory-mapped and read-only."""
        raise NotImplementedError
