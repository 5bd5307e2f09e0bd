"""A recipe: what to compile, for which device, and the steps between.

The model is checked when the file is read, so that a typo costs a second and not an hour. Absent
means that the device or the checkpoint decides; there is no `auto`, no `-1`, no environment
variable and no interpolation. `Recipe.error` makes an error at the place of a key, for everything
that is found out later.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    create_model,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from edgevlm.document import Complaint, Document, Options, parse_text, read, show
from edgevlm.errors import RecipeError
from edgevlm.passes import PASSES, Pass
from edgevlm.quant.options import CalibrationOptions

__all__ = [
    "FLOORS",
    "ContextOptions",
    "EvidenceOptions",
    "Gates",
    "GenerationOptions",
    "ImageOptions",
    "LossyGates",
    "Recipe",
    "ReducedGates",
    "json_schema",
    "load_recipe",
    "parse_recipe",
]

FLOORS = frozenset({"cosine", "argmax_agreement", "token_agreement"})
"""Gates whose bound is the least allowed; that of the others is the most."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

GridSide = Annotated[int, Field(ge=1)]


class ImageOptions(Options):
    """How pictures are cut; absent: as the checkpoint's processor does."""

    split: bool | None = Field(None, description="Split a large picture into tiles.")
    grids: tuple[tuple[GridSide, GridSide], ...] | None = Field(
        None,
        min_length=1,
        description="Patch grids (height, width) of a native-resolution encoder; one vision graph "
        "is made for each.",
    )


class ContextOptions(Options):
    """How much a session remembers."""

    capacity: int | None = Field(
        None, ge=16, description="Rows of prompt and answer together that the state has room for."
    )
    text_rows: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Rows of text beside one picture, for which the plan says what a prompt costs; "
        "absent: 64.",
    )


class GenerationOptions(Options):
    """Defaults of generation written into the bundle; absent: the checkpoint's."""

    max_new_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)


class Gates(Options):
    """Bounds that every rung of evidence must keep; a failing gate fails the compile.

    Errors are in units of the standard deviation of the reference, or of 1 where that is larger.
    """

    max_error: float = Field(1e-3, gt=0, description="Largest error of a logit, at most.")
    cosine: float = Field(0.9999, gt=0, le=1, description="Cosine to the rung below, at least.")
    kl: float = Field(1e-4, gt=0, description="Mean KL divergence of the logits, at most.")
    argmax_agreement: float = Field(0.995, gt=0, le=1, description="Equal argmax, at least.")
    token_agreement: float = Field(0.995, gt=0, le=1, description="Equal answers, at least.")
    accuracy_drop: float = Field(0.005, ge=0, le=1, description="Loss of task accuracy, at most.")

    def loosened(self) -> tuple[str, ...]:
        """Names of the gates that let more through than the defaults."""
        names = []
        for name, field in type(self).model_fields.items():
            asked, usual = getattr(self, name), field.default
            if asked < usual if name in FLOORS else asked > usual:
                names.append(name)
        return tuple(names)


class LossyGates(Options):
    """Bounds of a rung that is meant to lose something: a quantized model against the float one."""

    accuracy_drop: float = Field(0.03, ge=0, le=1, description="Loss of task accuracy, at most.")
    kl: float = Field(0.1, gt=0, description="Mean KL divergence of the logits, at most.")
    argmax_agreement: float = Field(0.9, gt=0, le=1, description="Equal argmax, at least.")


class ReducedGates(Options):
    """Bounds of a rung that sees fewer visual tokens than the one below it."""

    accuracy_drop: float = Field(0.05, ge=0, le=1, description="Loss of task accuracy, at most.")


class EvidenceOptions(Options):
    """What is measured before a bundle is written, and what it must pass."""

    data: str | None = Field(
        None,
        min_length=1,
        description="A folder with samples.jsonl, relative to the recipe; absent: the built-in "
        "picture world.",
    )
    samples: int = Field(16, ge=1, le=10_000, description="Samples that every rung answers.")
    max_new_tokens: int = Field(32, ge=1, description="Greedy tokens per sample.")
    gates: Gates = Gates()
    quantized: LossyGates = LossyGates()
    reduced: ReducedGates = ReducedGates()
    reason: str | None = Field(
        None, min_length=1, description="Why a gate is looser than usual; the manifest repeats it."
    )

    @property
    def loosened(self) -> dict[str, str]:
        """The gates that are looser than usual, with the reason."""
        return dict.fromkeys(self.gates.loosened(), self.reason or "")

    @model_validator(mode="after")
    def _loosening_has_a_reason(self) -> EvidenceOptions:
        usual = Gates()
        if self.reason is None and (names := self.gates.loosened()):
            loosened = ", ".join(
                f"{name} from {getattr(usual, name):g} to {getattr(self.gates, name):g}"
                for name in names
            )
            raise Complaint(
                f"gates are loosened without a reason: {loosened}",
                hint="say why in evidence.reason, which the manifest repeats",
                key="gates",
            )
        return self


class _StepOptions(Options):
    """A step as it is written: a mapping whose one key names the pass."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    key_noun: ClassVar[str] = "pass"

    @model_validator(mode="before")
    @classmethod
    def _has_one_key(cls, data: object) -> object:
        if not isinstance(data, Mapping) or len(data) != 1:
            raise Complaint(
                f"a pass must be a mapping with one key, got {show(data)}",
                hint=f"write '- {next(iter(PASSES))}: {{}}'",
            )
        return {name: {} if options is None else options for name, options in data.items()}


def _unwrapped(step: BaseModel) -> Pass:
    (name,) = step.model_fields_set
    found: Pass = getattr(step, name)
    return found


def _wrapped(step: Pass) -> dict[str, Any]:
    return {step.name: step.model_dump(mode="json")}


if TYPE_CHECKING:
    Step = Pass
else:
    # A model with one field per pass, so that places, suggestions and JSON Schema are pydantic's.
    _step_fields = {name: (step, None) for name, step in PASSES.items()}
    Step = Annotated[
        create_model("Step", __base__=_StepOptions, **_step_fields),
        AfterValidator(_unwrapped),
        PlainSerializer(_wrapped),
    ]


class Recipe(Options):
    """What to compile, for which device, and how; only `model` and `device` are needed."""

    model: str = Field(
        min_length=1,
        description="A checkpoint: a folder, relative to this file, or a Hugging Face id.",
    )
    revision: str | None = Field(
        None, min_length=1, description="Commit of a Hugging Face id, which must be pinned."
    )
    device: str = Field(min_length=1, description="The name of a file in devices/.")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="Forms to compile; absent: all that the device runs."
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="Type of weights and activations; absent: the device decides."
    )
    passes: tuple[Step, ...] = Field((), description="Rewrites of the model, in this order.")
    calibration: CalibrationOptions = CalibrationOptions()
    image: ImageOptions = ImageOptions()
    context: ContextOptions = ContextOptions()
    generation: GenerationOptions = GenerationOptions()
    evidence: EvidenceOptions = EvidenceOptions()
    seed: int = Field(0, ge=0, lt=2**32)

    _document: Document = PrivateAttr()

    @property
    def path(self) -> Path:
        """The file this recipe was read from."""
        return self._document.path

    @property
    def name(self) -> str:
        """The recipe's name: that of its file."""
        return self.path.stem

    @property
    def source(self) -> str:
        """The checkpoint: the path of a folder, or a Hugging Face id."""
        folder = self.path.parent / self.model
        return str(folder) if folder.exists() else self.model

    def error(self, message: str, *keys: str | int, hint: str | None = None) -> RecipeError:
        """An error at the place of these keys."""
        return self._document.error(message, *keys, hint=hint)


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe; the checkpoint folder it names must be there."""
    return _recipe(read(Path(path)))


def parse_recipe(text: str, path: Path | str = "recipe.yaml") -> Recipe:
    """Read a recipe from text, as if it stood in the file at `path`."""
    return _recipe(parse_text(text, Path(path)))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors (`recipes/recipe.schema.json`)."""
    schema = Recipe.model_json_schema()
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def _recipe(document: Document) -> Recipe:
    recipe = document.parse(Recipe)
    object.__setattr__(recipe, "_document", document)
    _check_model(recipe)
    return recipe


def _check_model(recipe: Recipe) -> None:
    folder = recipe.path.parent / recipe.model
    if folder.is_dir():
        if recipe.revision is not None:
            raise recipe.error(
                "revision is for a Hugging Face id, and model is a folder",
                "revision",
                hint="remove revision",
            )
        return
    parent = recipe.model.split("/")[0]
    looks_local = parent in (".", "..", "", "~") or (recipe.path.parent / parent).is_dir()
    if folder.exists() or looks_local or not _HUB_ID.fullmatch(recipe.model):
        hint = (
            "give a folder relative to the recipe, or a Hugging Face id such as "
            "'HuggingFaceTB/SmolVLM-256M-Instruct'"
        )
        if folder.parent.is_dir():
            folders = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
            for near in difflib.get_close_matches(folder.name, folders, n=1):
                hint = f"did you mean {str(Path(recipe.model).parent / near)!r}?"
        raise recipe.error(f"no checkpoint folder {str(folder)!r}", "model", hint=hint)
