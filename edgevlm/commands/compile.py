"""`edgevlm compile`: a recipe becomes a bundle; the evidence for it is shown."""

from __future__ import annotations

import time
from pathlib import Path

from edgevlm.commands.bundle import bundle_document, show_evidence
from edgevlm.commands.output import console, mebibytes, print_json
from edgevlm.commands.progress import shown_progress, silence_libraries
from edgevlm.recipe import load_recipe


def compile_command(path: Path, out: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Compile a recipe and show what came of it."""
    recipe = load_recipe(path)
    # torch takes seconds to import: only once the recipe is known to be good.
    from edgevlm.compile import compile_recipe
    from edgevlm_runtime.bundle import Bundle

    out = out or Path("build") / recipe.name
    silence_libraries()
    begun = time.monotonic()
    compile_recipe(recipe, out, progress=shown_progress(quiet=quiet or as_json))
    seconds = time.monotonic() - begun
    bundle = Bundle.open(out)
    if as_json:
        print_json({**bundle_document(bundle), "seconds": seconds})
        return
    terminal = console()
    show_evidence(bundle.manifest.provenance, terminal)
    size = sum(entry.size for entry in bundle.manifest.files.values())
    terminal.print()
    terminal.print(f"{out}  {mebibytes(size)}, compiled in {seconds:.0f} s")
