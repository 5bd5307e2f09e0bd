"""`compile_recipe`: the whole way from a recipe to a published bundle.

    recipe -> plan -> model -> passes -> graphs -> evidence -> manifest -> one rename

Every stage is kept in the stage cache under the hash of what went into it, so a compile that was
killed goes on where it stopped, and a bundle is absent or whole.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from edgevlm.asked import Asked
from edgevlm.audit.bundle import audit_of, processor_key
from edgevlm.audit.report import GraphAudit, require_as_asked
from edgevlm.cache import StageCache, code_version, default_root, digest
from edgevlm.checkpoint import load, open_checkpoint
from edgevlm.decisions import refuse
from edgevlm.evidence.exam import Exam
from edgevlm.evidence.gates import limits
from edgevlm.evidence.gather import Form, Subject, graph_evidence, model_evidence
from edgevlm.evidence.ladder import Climb
from edgevlm.evidence.sites import site_evidence
from edgevlm.evidence.witness import Witness
from edgevlm.families.text_spec import tokenizer_json
from edgevlm.graphs import manifest_variant, write_graphs
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes.base import Applied, Context
from edgevlm.passes.quantize import Quantize, scheme_from
from edgevlm.passes.reduce import Reduce
from edgevlm.passes.stages import chain, run_stages
from edgevlm.plan import Plan, VariantPlan, image_choices, make_plan, recipe_device
from edgevlm.progress import Progress, Silent
from edgevlm.publish import publishing
from edgevlm.recipe import Recipe
from edgevlm_runtime._version import __version__
from edgevlm_runtime.files import entry_of
from edgevlm_runtime.manifest import FORMAT_VERSION, FileEntry, Manifest, ModelInfo
from edgevlm_runtime.structure import to_json
from edgevlm_runtime.text import TextSpec

HF_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
TOKENIZER = "tokenizer.json"
TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def compile_recipe(
    recipe: Recipe, out: Path, *, cache: StageCache | None = None, progress: Progress | None = None
) -> Path:
    """Compile a recipe into a bundle at `out`, and return that path.

    Raises the errors of `edgevlm.errors`: a recipe or a checkpoint that is wrong, a device that
    lacks something, a gate of evidence that fails. Then `out` stays as it was.
    """
    job = Job(recipe, cache or StageCache(root=default_root()), progress or Silent())
    refuse(job.plan.decisions)
    with publishing(out) as staging:
        job.fill(staging)
    job.cache.prune()
    return out


class Job:
    """One compile: what each stage needs, made when it is first asked for."""

    def __init__(self, recipe: Recipe, cache: StageCache, progress: Progress) -> None:
        """Read the recipe's checkpoint and plan; no weights yet."""
        self.recipe, self.cache, self.progress = recipe, cache, progress
        self.checkpoint = open_checkpoint(recipe.source, recipe.revision)
        self._spec = self.checkpoint.spec(image_choices(recipe))
        self.plan: Plan = make_plan(recipe, recipe_device(recipe), self._spec)
        self._passed: tuple[Vlm, tuple[Applied, ...]] | None = None
        self.context = Context(
            device=self.plan.device,
            targets=tuple(variant.target for variant in self.plan.variants),
            seed=recipe.seed,
            probe=probe,
            calibration=lambda spec: self._asked(spec).calibration(),
            samples_key=self.asked.calibration_key(),
            progress=progress,
            folder=recipe.path.parent,
        )

    @cached_property
    def checkpoint_key(self) -> str:
        """Hash of the checkpoint's content and of the code that reads it."""
        return digest(code_version(), self.checkpoint.content_key(), self.recipe.image)

    @cached_property
    def model_key(self) -> str:
        """Hash of the model after its passes."""
        return self.key_after(len(self.recipe.passes))

    def key_after(self, count: int) -> str:
        """Hash of the model after so many of its passes."""
        return chain(self.checkpoint_key, self.recipe.passes[:count], self.context)

    @cached_property
    def graphs_key(self) -> str:
        """Hash of what the graphs are written from."""
        return digest(self.model_key, self.plan.variants)

    def fill(self, staging: Path) -> None:
        """Write the whole bundle into an empty folder.

        Our model is held to the reference before its graphs are written, which takes longest, and
        let go before they are opened: one copy of the weights at a time is what fits beside a large
        model.
        """
        subject, climb = self.subject(), self.climb()
        below = model_evidence(subject, climb)
        graphs = self.cache.build("graphs", self.graphs_key, self._write_graphs)
        changes = self.cache.json("changes", self.model_key, self._changes)
        self.release()
        files = self._write_files(graphs, staging)
        provenance = self._provenance(changes["changes"])
        # The graphs are measured as a user has them: from a whole bundle, which lacks evidence.
        write_manifest(staging, self._manifest(files, provenance))
        rungs = list(below.rungs)
        # A stage that was altered in the cache has other files: their evidence is their own.
        files_key = digest(self.graphs_key, files)
        for variant in self.plan.variants:
            rungs += graph_evidence(subject, climb, below, variant, staging, files_key)
        evidence: dict[str, Any] = {
            "samples": self.asked.note(climb.exam),
            "rungs": [r.to_json() for r in rungs],
        }
        if self.plan.spec.schemes:
            key = digest([form.key for form in subject.forms], climb.exam.digest)
            evidence["sites"] = self.cache.json(
                "sites", key, lambda: self._site_evidence(climb.exam, below.float_answers)
            )
        spec = self._spec_after(changes["changes"])
        audits = {
            variant.target: self._audits(variant, spec, staging, files_key)
            for variant in self.plan.variants
        }
        provenance |= {"evidence": evidence, "audit": audits}
        write_manifest(staging, self._manifest(files, provenance))

    def _site_evidence(self, exam: Exam, reference: Sequence[Witness]) -> dict[str, Any]:
        """The noise and the harm of every quantized site; holds the model twice, before and after.

        The float one is the last before anything was rounded.
        """
        quantized = self.model()
        self._passed = None
        float_model = self.model(self._float_form.count)
        found = site_evidence(float_model, quantized, exam, reference, self.progress)
        del float_model, quantized
        self.release()
        return found

    def _spec_after(self, changes: Sequence[Mapping[str, Any]]) -> VlmSpec:
        """The plan's spec, with the schemes that were given: a budget may have chosen others."""
        spec = self.plan.spec
        for change in changes:
            if change["schemes"]:
                given = change["schemes"].items()
                spec = replace(spec, schemes={site: scheme_from(data) for site, data in given})
        return spec

    def _audits(
        self, variant: VariantPlan, spec: VlmSpec, staging: Path, files_key: str
    ) -> list[dict[str, Any]]:
        """What ran of each graph; raises EvidenceError where a recipe is strict and it differs."""
        steps = [step for step in self.recipe.passes if isinstance(step, Quantize)]
        if not steps:
            return []
        made = manifest_variant(self.plan, variant)
        # Which kernels there are, and what they round, is the processor's.
        key = digest(files_key, variant.target, processor_key())

        def audit() -> dict[str, Any]:
            audits = []
            with self.progress.stage(f"audit: {variant.target}", len(made.graphs)) as advance:
                for graph in made.graphs:
                    audits.append(audit_of(spec, made, graph, staging).to_json())
                    advance(1)
            return {"graphs": audits}

        found: list[dict[str, Any]] = self.cache.json("audit", key, audit)["graphs"]
        if any(step.strict for step in steps):
            require_as_asked(GraphAudit.from_json(data) for data in found)
        return found

    def _write_files(self, graphs: Path, staging: Path) -> dict[str, FileEntry]:
        """Put everything but the manifest into the bundle; return what was written."""
        with self.progress.stage("files", 1) as advance:
            for path in sorted(graphs.iterdir()):
                shutil.copyfile(path, staging / path.name)
            for name in HF_FILES:
                if name in self.checkpoint.files:
                    (staging / name).write_bytes(self.checkpoint.files[name])
            (staging / TOKENIZER).write_bytes(self._tokenizer)
            files = file_entries(staging)
            advance(1)
        return files

    @cached_property
    def _tokenizer(self) -> bytes:
        """The tokenizer as transformers runs it, which need not be what its file says."""
        return tokenizer_json(self.checkpoint.folder, TextSpec.from_json(self._spec.text))

    def model(self, count: int | None = None) -> Vlm:
        """The model after so many of its passes, or all, held until `release`."""
        return self._run_passes(len(self.recipe.passes) if count is None else count)[0]

    def release(self) -> None:
        """Let go of the model, and give its memory back to the system."""
        self._passed = None
        release_memory()

    def _run_passes(self, count: int) -> tuple[Vlm, tuple[Applied, ...]]:
        """Go on from the model that is held, where it has had no more passes than that."""
        if self._passed is None or len(self._passed[1]) > count:
            self.release()
            with self.progress.stage("load", 1) as advance:
                self._passed = load(self.checkpoint, self._spec), ()
                advance(1)
        model, applied = self._passed
        steps = self.recipe.passes[len(applied) : count]
        if steps:
            key = self.key_after(len(applied))
            with self.progress.stage("passes", len(steps)) as advance:
                model, more = run_stages(steps, model, self.context, self.cache, key)
                advance(len(steps))
            self._passed = model, (*applied, *more)
        return self._passed

    def _write_graphs(self, folder: Path) -> None:
        write_graphs(self.model(), self.plan, folder, self.progress)

    def _changes(self) -> dict[str, Any]:
        applied = self._run_passes(len(self.recipe.passes))[1]
        return {
            "changes": [
                {"pass": entry.step.name, "options": entry.step.model_dump(mode="json")}
                | asdict(entry.change)
                for entry in applied
            ]
        }

    def subject(self) -> Subject:
        """What the evidence is about."""
        return Subject(
            checkpoint=self.checkpoint,
            checkpoint_key=self.checkpoint_key,
            spec=self._spec,
            model=self.model,
            release=self.release,
            forms=self.forms,
        )

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """The models that are measured: ours before anything is lost, then after each loss."""
        steps = self.recipe.passes
        lossy = [count for count, step in enumerate(steps) if not step.lossless]
        counts = [*lossy, len(steps)]
        forms = [self._form("ours", counts[0])]
        for place, count in enumerate(lossy):
            name = steps[count].name
            same = sum(form.name.startswith(name) for form in forms)
            form = self._form(f"{name}_{same + 1}" if same else name, counts[place + 1])
            kind = "reduced" if isinstance(steps[count], Reduce) else "quantized"
            forms.append(replace(form, kind=kind))
        return tuple(forms)

    @property
    def _float_form(self) -> Form:
        """The last model before anything was rounded."""
        return [form for form in self.forms if form.kind != "quantized"][-1]

    def _form(self, name: str, count: int) -> Form:
        """The model after so many passes, with the exam that asks it."""
        exam = self._asked(self.spec_after(count)).exam()
        return Form(name=name, count=count, key=self.key_after(count), exam=exam)

    def spec_after(self, count: int) -> VlmSpec:
        """The spec after so many of the passes, as far as it is known without weights."""
        spec = self._spec
        for step in self.recipe.passes[:count]:
            spec = step.foresee(spec, self.context).spec
        return spec

    def _asked(self, spec: VlmSpec) -> Asked:
        return Asked(
            recipe=self.recipe,
            spec=spec,
            tokenizer=self._tokenizer,
            capacity=self.plan.tokens.capacity,
            is_drawn=self.checkpoint.seed is not None,
        )

    @cached_property
    def asked(self) -> Asked:
        """What our model is asked before any pass."""
        return self._asked(self._spec)

    def climb(self) -> Climb:
        """What is asked of every rung, and the bounds it is held to."""
        bounds = limits(
            self.recipe.evidence,
            reduced=self.plan.spec.reduction is not None,
            quantized=self.plan.spec.is_quantized,
            drawn=self.asked.is_drawn,
        )
        exam = self._float_form.exam
        return Climb(exam=exam, bounds=bounds, cache=self.cache, progress=self.progress)

    def _provenance(self, changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": {"edgevlm": __version__}
            | {name: importlib.metadata.version(name) for name in TOOLS},
            "code": code_version(),
            "changes": list(changes),
            "decisions": [asdict(decision) for decision in self.plan.decisions],
            "notes": list(self._spec.notes),
        }

    def _manifest(self, files: Mapping[str, FileEntry], provenance: Mapping[str, Any]) -> Manifest:
        variants = {v.target: manifest_variant(self.plan, v) for v in self.plan.variants}
        options = self.recipe.generation.model_dump(exclude_none=True)
        return Manifest(
            format_version=FORMAT_VERSION,
            name=self.recipe.name,
            device=self.plan.device.name,
            model=ModelInfo(
                name=Path(self.checkpoint.source).name,
                family=self._spec.family,
                source=self.recipe.model,
                revision=self.checkpoint.revision,
            ),
            variants=variants,
            default_variant=self.plan.variants[0].target,
            image=self.plan.spec.image,
            text=self._asked(self.plan.spec).text,
            generation=replace(self._spec.generation, **options),
            files=files,
            provenance=provenance,
        )


def probe(model: Vlm) -> torch.Tensor:
    """Logits of one seeded picture and a few seeded rows, which a lossless pass must keep."""
    generator = torch.Generator().manual_seed(0)
    spec = model.spec
    grid = spec.vision.grids[0]
    pixels = torch.randn(1, *spec.vision.pixels_shape(grid), generator=generator)
    ids = torch.randint(spec.decoder.vocab_size, (8,), generator=generator)
    with torch.inference_mode():
        rows = torch.cat([model.encode(pixels, grid), model.embedding(ids)[None]], dim=1)
        positions = torch.arange(rows.shape[1])
        if spec.decoder.rope.sections:
            positions = positions.expand(len(spec.decoder.rope.sections), -1)
        logits: torch.Tensor = model(rows, positions)
    return logits


def release_memory() -> None:
    """Give freed weights back to the system; glibc keeps blocks under 32 MiB otherwise."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file of a folder."""
    return {path.name: entry_of(path) for path in sorted(folder.iterdir())}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, the last file of a bundle."""
    text = json.dumps(to_json(manifest), indent=1, sort_keys=True, allow_nan=False)
    (folder / "manifest.json").write_text(text + "\n")
