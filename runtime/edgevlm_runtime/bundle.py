"""A bundle: a directory that one manifest describes, every byte checked before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from edgevlm_runtime.consistency import check_manifest
from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.files import MANIFEST, BundleFiles, read_manifest
from edgevlm_runtime.manifest import FORMAT_VERSION, Manifest, Variant
from edgevlm_runtime.structure import from_json, read_json


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bundle:
    """An opened bundle: its manifest, the variant in use, its verified files."""

    path: Path
    manifest: Manifest
    variant_name: str
    files: BundleFiles

    @classmethod
    def open(cls, path: str | PathLike[str], variant: str | None = None) -> Bundle:
        """Read the manifest, check the files, choose a variant.

        Weight files may still be hashed when this returns: `check` waits for them, and so does
        whatever uses them. Files stay mapped as they were checked. Nobody may write to them while
        the bundle is in use; replacing the whole directory (as the compiler does) is safe.
        """
        folder = Path(path)
        manifest = parse_manifest(read_manifest(folder))
        name = manifest.default_variant if variant is None else variant
        if name not in manifest.variants:
            raise BundleError(
                f"bundle {manifest.name!r} has no variant {name!r}",
                hint=f"it has {', '.join(sorted(map(repr, manifest.variants)))}",
            )
        files = BundleFiles(folder, manifest.files)
        bundle = cls(path=folder, manifest=manifest, variant_name=name, files=files)
        weights = {
            weight
            for variant in manifest.variants.values()
            for graph in variant.graphs
            for weight in graph.weights
        }
        for name in manifest.files.keys() - weights:
            bundle.file(name)
        return bundle

    def check(self) -> None:
        """Wait until every file is hashed; raise BundleError where one was altered."""
        for name in self.files:
            self.file(name)

    @property
    def variant(self) -> Variant:
        """The variant in use."""
        return self.manifest.variants[self.variant_name]

    def file(self, name: str) -> memoryview:
        """The verified bytes of a listed file, memory-mapped and read-only."""
        if name not in self.manifest.files:
            raise BundleError(
                f"bundle {self.manifest.name!r} has no file {name!r}", hint="compile it again"
            )
        return self.files[name]


def parse_manifest(text: bytes | str) -> Manifest:
    """Check and read the text of a manifest."""
    data = read_json(text)
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        raise BundleError(
            f"bundle has format version {version}, this runtime reads version {FORMAT_VERSION}",
            hint="upgrade edgevlm-runtime, or compile the bundle again"
            if version > FORMAT_VERSION
            else "compile the bundle again",
        )
    manifest = from_json(Manifest, data, MANIFEST)
    check_manifest(manifest)
    return manifest
