"""Every recipe of a folder through the command line: plan, compile, and one answer of every form.

For each recipe what its evidence says is kept: answers that are those of our torch model with the
same reduction, token for token, and the largest error of a logit, by form; and how long the compile
took. What is done is kept in --work, and a second run goes on from there. Usage:

    python benchmarks/recipes.py recipes/reduce --json devices/reports/reduce-recipes.json
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from paired import parser, report

from edgevlm.cache import code_version, digest, file_digest
from edgevlm.scenes import SPLITS, draw_scene, make_scene

QUESTION = "What is in the picture?"


def main() -> int:
    """Go through the recipes."""
    options = parser(__doc__)
    options.add_argument("recipes", type=Path, help="a folder of recipes")
    options.add_argument("--only", nargs="*", default=None, help="these names")
    options.add_argument("--work", type=Path, default=Path("build/recipes"))
    arguments = options.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    picture = arguments.work / "picture.png"
    draw_scene(make_scene(SPLITS["evaluation"].start)).save(picture)
    found = sorted(arguments.recipes.glob("*.yaml"))
    rows = {}
    for recipe in found:
        if arguments.only is not None and recipe.stem not in arguments.only:
            continue
        kept = arguments.work / f"{recipe.stem}.json"
        key = digest(code_version(), file_digest(recipe))
        row = json.loads(kept.read_text()) if kept.exists() else {}
        if row.get("key") != key:
            row = {"key": key} | tried(recipe, arguments.work / recipe.stem, picture)
            kept.write_text(json.dumps(row, indent=1))
        rows[recipe.stem] = {name: value for name, value in row.items() if name != "key"}
        print(recipe.stem, json.dumps(rows[recipe.stem]), flush=True)
    failed = [name for name, row in rows.items() if not row["passed"]]
    figures = {"recipes": len(rows), "failed": failed, "rows": rows}
    report("recipes", figures, arguments)
    return 1 if failed else 0


def tried(recipe: Path, bundle: Path, picture: Path) -> dict[str, Any]:
    """What became of a recipe; its bundle is thrown away."""
    code, _, said = command("plan", str(recipe), "--json")
    if code:
        return {"passed": False, "plan": said}
    shutil.rmtree(bundle, ignore_errors=True)
    begun = time.monotonic()
    code, _, said = command("compile", str(recipe), "--out", str(bundle), "--quiet")
    if code:
        return {"passed": False, "compile": said}
    row: dict[str, Any] = {"compile_s": round(time.monotonic() - begun)}
    provenance = json.loads((bundle / "manifest.json").read_text())["provenance"]
    forms, answers = {}, {}
    for rung in provenance["evidence"]["rungs"]:
        if rung["kind"] in ("graph", "runtime"):
            tokens = rung["tokens"]
            forms[rung["name"]] = f"{tokens['identical']} of {tokens['answers']}"
        if rung["kind"] == "graph":
            row[f"{rung['name']}_error"] = rung["decoder"]["relative_error"]
            code, text, said = command(
                "run", str(bundle), QUESTION, "--image", str(picture), "--variant", rung["name"],
                "--temperature", "0",
            )  # fmt: skip
            if code:
                return {"passed": False, "run": said}
            answers[rung["name"]] = text.strip()
    shutil.rmtree(bundle)
    is_same = len(set(answers.values())) == 1
    return row | {"identical": forms, "answers": answers, "passed": is_same}


def command(*words: str) -> tuple[int, str, str]:
    """Exit code, output and what was said of an error, of one command of edgevlm."""
    done = subprocess.run(
        [sys.executable, "-m", "edgevlm", *words], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr[-600:]


if __name__ == "__main__":
    sys.exit(main())
