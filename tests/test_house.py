"""The rules of the house: what holds for every file, checked in one place."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevlm.passes import PASSES, Pass
from edgevlm_export.forms import FORMS

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "edgevlm": ROOT / "edgevlm",
    "edgevlm_export": ROOT / "export" / "edgevlm_export",
    "edgevlm_runtime": ROOT / "runtime" / "edgevlm_runtime",
}
SOURCES = [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py")) + sorted((ROOT / "recipes").rglob("*.py"))
EVERYTHING = [*SOURCES, *TESTS, *SCRIPTS]
MAX_LINES = 400

# What runs code that came with data, or a shell; and the loader of YAML that builds objects.
BANNED = {
    r"\bpickle\b(?!=False)": "pickle",
    r"\bcPickle\b|\bdill\b|\bshelve\b|\bmarshal\b": "pickle by another name",
    r"(?<![\w.])eval\(": "eval",
    r"(?<![\w.])exec\(": "exec",
    r"\byaml\.(load|unsafe_load|full_load)\(": "yaml.load",
    r"shell\s*=\s*True|os\.system\(|os\.popen\(": "a shell",
    r"\btorch\.load\(": "torch.load",
    r"trust_remote_code\s*=\s*True": "remote code",
    r"allow_pickle\s*=\s*True": "pickled arrays",
}

# The trainer reads back its own optimizer state, as tensors only.
ALLOWED = {("edgevlm/scenes/loop.py", "torch.load")}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules() -> Iterator[str]:
    for name, folder in PACKAGES.items():
        yield name
        for module in pkgutil.walk_packages([str(folder)], prefix=f"{name}."):
            if not module.name.endswith("__main__"):
                yield module.name


def code_without_text(path: Path) -> str:
    """The source with every string and comment blanked out: prose may name what code may not do."""
    import io
    import tokenize

    lines = path.read_text().splitlines(keepends=True)
    strings = {tokenize.STRING, tokenize.COMMENT}
    strings |= {getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    kept = []
    for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline):
        if token.type not in strings:
            kept.append(token.string)
    return re.sub(r"\s*([.()=])\s*", r"\1", " ".join(kept))


def test_files_are_short() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in EVERYTHING}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_files_open_with_a_sentence() -> None:
    wordless = []
    for path in EVERYTHING:
        docstring = ast.get_docstring(ast.parse(path.read_text())) or " "
        if docstring.splitlines()[0].rstrip()[-1:] not in tuple(".:,;)"):
            wordless.append(relative(path))
    assert wordless == []


def banned_in(path: Path) -> list[str]:
    code = code_without_text(path)
    return [what for pattern, what in BANNED.items() if re.search(pattern, code)]


def test_nothing_banned_is_called() -> None:
    found = {(relative(path), what) for path in (*SOURCES, *SCRIPTS) for what in banned_in(path)}
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle\n", "pickle"),
        ("x = eval ( 'a' )\n", "eval"),
        ("subprocess.run('a', shell = True)\n", "a shell"),
        ("torch.load(path)\n", "torch.load"),
        ("yaml.load(text)\n", "yaml.load"),
    ],
)
def test_the_ban_bites(tmp_path: Path, code: str, what: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(code)
    found = [
        name for pattern, name in BANNED.items() if re.search(pattern, code_without_text(path))
    ]
    assert found == [what]


def test_no_unfinished_work() -> None:
    marks = r"\b(?:TODO|FIXME|XXX|HACK)\b|raise NotImplementedError"
    assert [relative(path) for path in SOURCES if re.search(marks, path.read_text())] == []


def test_public_names_are_documented_and_sorted() -> None:
    problems = []
    for name in modules():
        module = importlib.import_module(name)
        public = getattr(module, "__all__", [])
        if list(public) != sorted(public, key=importance):
            problems.append(f"{name}.__all__ is not sorted")
        problems += [f"{name}.{item} is not there" for item in public if not hasattr(module, item)]
        for item, value in vars(module).items():
            own = getattr(value, "__module__", None) == name and not item.startswith("_")
            written = inspect.isclass(value) or inspect.isfunction(value)
            # A dataclass without a docstring gets its signature for one.
            if own and written and (value.__doc__ or f"{item}(").startswith(f"{item}("):
                problems.append(f"{name}.{item} has no docstring")
    assert problems == []


def importance(name: str) -> tuple[int, str]:
    """Constants, then types, then functions, as ruff sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_layers() -> None:
    run = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_pass_is_registered_under_the_name_of_its_file() -> None:
    import edgevlm.passes

    defined: dict[str, type[Pass]] = {}
    for info in pkgutil.iter_modules(edgevlm.passes.__path__):
        module = importlib.import_module(f"edgevlm.passes.{info.name}")
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, Pass) and not inspect.isabstract(value):
                assert value.name == value.__module__.rpartition(".")[2]
                defined[value.name] = value
    assert defined == PASSES


def test_every_pass_has_its_test() -> None:
    for name in PASSES:
        assert (ROOT / "tests" / "edgevlm" / "passes" / f"test_{name}.py").is_file(), name


def test_forms_are_those_of_the_targets() -> None:
    from edgevlm_export.targets import TARGETS

    assert {name: (target.form, target.static_shapes) for name, target in TARGETS.items()} == {
        name: (form, bool(form.rows)) for name, form in FORMS.items()
    }


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules that a run of the command line imports."""
    code = (
        "import sys\n"
        "from edgevlm.cli import run\n"
        f"code = run({list(arguments)!r})\n"
        "print('\\n'.join(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_imports_nothing_heavy() -> None:
    """What makes `--help` quick, independent of how busy the machine is."""
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "numpy", "pydantic", "PIL"}
    assert not heavy & imported_by("--help")


def test_devices_need_no_torch() -> None:
    assert not {"torch", "transformers", "onnx", "onnxruntime"} & imported_by("devices")


def test_every_version_is_pinned() -> None:
    """constraints.txt names an exact version of everything that pyproject.toml asks for."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            assert re.fullmatch(r"[\w.]+", version), line
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    wanted = set()
    for project in (ROOT / "pyproject.toml", ROOT / "runtime" / "pyproject.toml"):
        for name in re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w+\])?(?:>=|~=)', project.read_text()):
            wanted.add(re.sub(r"[-_.]+", "-", name).lower())
    wanted -= {"edgevlm-runtime", "onnxruntime-gpu", "hatchling"}
    assert wanted <= set(pins), sorted(wanted - set(pins))


def test_torch_is_never_asked_for_bare() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "-m pip install --quiet --disable-pip-version-check $(TORCH)" in makefile
    assert re.search(r"^torch==2\.13\.0$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
