"""The published methods, each a composition of pieces in a file of `methods/`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic import Field

from edgevlm.document import Options, read
from edgevlm.reduce.fusion import FusionOptions
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.positions import PositionOptions
from edgevlm.reduce.remembering import RememberOptions

__all__ = ["Method", "load_method", "method_names"]

_FOLDER = Path(__file__).parent / "methods"


class Method(Options):
    """A named composition."""

    summary: str = Field(min_length=1, description="What it does, in a line.")
    source: str = Field(min_length=1, description="The paper or project it is from.")
    notes: tuple[str, ...] = Field((), description="Where this form differs from the published.")
    stages: tuple[StageOptions, ...] = Field(min_length=1)
    positions: PositionOptions | None = Field(None, description="Where visual tokens stand.")
    fusion: FusionOptions | None = Field(None, description="What text sees before the decoder.")
    remember: RememberOptions | None = Field(
        None, description="What visual tokens look at again within the decoder."
    )

    @property
    def learns(self) -> bool:
        """Whether it means something only with weights that were trained for it."""
        pieces = (piece for stage in self.stages for piece in stage.pieces)
        is_learned = any(piece.is_learned for piece in pieces)
        return is_learned or self.fusion is not None or self.remember is not None


def method_names() -> tuple[str, ...]:
    """The methods there are."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


@lru_cache
def load_method(name: str) -> Method:
    """Read a method by its name."""
    return read(_FOLDER / f"{name}.yaml").parse(Method)
