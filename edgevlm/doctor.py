"""The doctor: what is installed, what works on this machine, and what to install for the rest.

What can be tried is tried: every target has a small graph with the operators it stands on, which is
loaded, run and held against numpy.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgevlm.cache import default_root
from edgevlm.resources import constraints_file

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Examination", "Machine", "Package", "Trial", "examine"]

DISTRIBUTIONS = ("edgevlm", "edgevlm-runtime")
FEATURES = {
    "x86_64": "avx2 avx512f avx_vnni avx512_vnni avx512_bf16 amx_int8 amx_bf16",
    "aarch64": "asimd asimdhp asimddp i8mm bf16 sve",
}
VNNI = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package that edgevlm uses: the version here, and the one that was tested."""

    name: str
    extra: str | None
    installed: str | None
    tested: str | None

    @property
    def status(self) -> Literal["ok", "untested", "missing"]:
        """Whether it is there, in the version that was tested."""
        if self.installed is None:
            return "missing"
        # A build of the same version (2.13.0+cpu) is that version.
        return "ok" if self.installed.split("+")[0] == self.tested else "untested"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine this runs on."""

    system: str
    python: str
    cpu: str
    features: tuple[str, ...]
    cores: int
    memory_bytes: int
    available_bytes: int
    cache: str
    cache_free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Something that was tried here: an engine, or a target form."""

    name: str
    works: bool
    detail: str
    hint: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """All that the doctor found; `advice` says what to install or remove, and what for."""

    machine: Machine
    packages: tuple[Package, ...]
    trials: tuple[Trial, ...]
    advice: tuple[str, ...]


def examine() -> Examination:
    """Look at this machine and try what can be tried."""
    tested = _tested()
    packages, machine = _packages(tested), _machine()
    trials = tuple(_try(name, probe) for name, probe in PROBES.items())
    return Examination(
        machine=machine,
        packages=packages,
        trials=trials,
        advice=(*_advice(packages, trials, tested["torch"]), *_device_advice(machine)),
    )


def _tested() -> dict[str, str]:
    """Tested versions by package, in pip's spelling of names."""
    lines = constraints_file().read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {_spelled(name): version for name, version in pins}


def _spelled(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _packages(tested: Mapping[str, str]) -> tuple[Package, ...]:
    wanted: dict[str, str | None] = {}
    for distribution in DISTRIBUTIONS:
        for requirement in importlib.metadata.requires(distribution) or ():
            name = re.match(r"[\w.-]+", requirement)
            extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", requirement)
            if name is None or name.group() in DISTRIBUTIONS:
                continue
            # The extras of graphics cards are other people's; their advice would mislead here.
            if extra is None or extra.group(1) in ("compile", "cpu", "test"):
                wanted.setdefault(name.group(), None if extra is None else extra.group(1))
    return tuple(
        Package(name=name, extra=extra, installed=_version(name), tested=tested.get(_spelled(name)))
        for name, extra in sorted(wanted.items(), key=lambda item: (item[1] or "", item[0]))
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Machine:
    info = _proc("cpuinfo")
    memory = _proc("meminfo")
    flags = set((info.get("flags") or info.get("Features") or "").split())
    known = FEATURES.get(platform.machine(), "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = memory.get("MemAvailable", "").removesuffix(" kB")
    cache = default_root()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu=info.get("model name") or platform.processor() or "unknown",
        features=tuple(feature for feature in known if feature in flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
        memory_bytes=pages,
        available_bytes=int(available) * 1024 if available else pages,
        cache=str(cache),
        cache_free_bytes=shutil.disk_usage(_nearest_folder(cache)).free,
    )


def _proc(name: str) -> dict[str, str]:
    """Fields of a file of /proc, the first of each name; empty where there is none."""
    path = Path("/proc") / name
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _cores() -> int:
    return os.cpu_count() or 1


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _try(name: str, probe: Callable[[], str]) -> Trial:
    try:
        return Trial(name=name, works=True, detail=probe())
    except ModuleNotFoundError as error:
        return Trial(name=name, works=False, detail=f"{error.name} is not installed")
    # Whatever a broken installation raises is the finding.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Trial(
            name=name,
            works=False,
            detail=f"{type(error).__name__}: {first}",
            hint="reinstall onnxruntime in the tested version",
        )


def _probe_compiler() -> str:
    """Import what a compile needs, and run one product."""
    import onnx_ir
    import onnxscript
    import safetensors
    import torch
    import transformers

    del onnx_ir, onnxscript, safetensors
    product = torch.ones(2, 3) @ torch.ones(3, 2)
    assert product[0, 0] == 3.0
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def _probe_engine() -> str:
    import onnxruntime

    providers = ", ".join(onnxruntime.get_available_providers())
    return f"onnxruntime {onnxruntime.__version__}: {providers}"


def _probe_ort() -> str:
    """One row of grouped attention over an empty cache gives that row's value back."""
    from onnx import TensorProto, helper

    row, cache = (1, 1, 16), (1, 1, 4, 16)
    shapes = {"q": row, "k": row, "v": row, "past_k": cache, "past_v": cache}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    inputs.append(helper.make_tensor_value_info("last_slot", TensorProto.INT32, (1,)))
    inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, ()))
    node = helper.make_node(
        "GroupQueryAttention",
        [value.name for value in inputs],
        ["y", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=1,
        kv_num_heads=1,
    )
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("y", row), ("present_k", cache), ("present_v", cache))
    ]
    graph = helper.make_graph([node], "probe", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    feeds |= {"last_slot": np.zeros(1, np.int32), "total": np.array(1, np.int32)}
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return _run(model, feeds, feeds["v"], "GroupQueryAttention in float32")


def _probe_static() -> str:
    """A product and a softmax in standard operators of opset 19."""
    from onnx import TensorProto, helper

    shapes = {"a": (2, 3), "b": (3, 4)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["a", "b"], ["ab"]),
            helper.make_node("Softmax", ["ab"], ["y"], axis=-1),
        ],
        "probe",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 4))],
    )
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    exponents = np.exp(feeds["a"] @ feeds["b"])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    expected = exponents / exponents.sum(axis=-1, keepdims=True)
    return _run(model, feeds, expected, "opset 19 in float32")


def _run(model: ModelProto, feeds: Mapping[str, Any], expected: Any, what: str) -> str:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (output, *_) = session.run(None, feeds)
    error = float(np.abs(output - expected).max())
    if not error < 1e-5:
        raise ArithmeticError(f"{what} is wrong by {error:.2g}")
    return f"{what}, right to {error:.0e}"


def _device_advice(machine: Machine) -> tuple[str, ...]:
    """Which device file fits this processor better than host-cpu, which knows the least of it."""
    if not set(machine.features) & VNNI:
        return ()
    return (
        "this processor multiplies 8-bit weights exactly: `device: x86-vnni` in a recipe keeps all "
        "their bits where host-cpu keeps 7",
    )


PROBES: Mapping[str, Callable[[], str]] = {
    "compiler": _probe_compiler,
    "engine ort": _probe_engine,
    "target ort": _probe_ort,
    "target static": _probe_static,
}


def _advice(
    packages: tuple[Package, ...], trials: tuple[Trial, ...], torch: str
) -> tuple[str, ...]:
    advice = []
    missing: dict[str | None, list[str]] = {}
    for package in packages:
        if package.status == "missing":
            missing.setdefault(package.extra, []).append(package.name)
    purposes = {
        None: ("edgevlm at all", "pip install edgevlm"),
        "compile": (
            "to compile",
            f'pip install torch=={torch} && pip install -c constraints.txt "edgevlm[compile]"',
        ),
        "cpu": ("to run bundles on a CPU", 'pip install "edgevlm-runtime[cpu]"'),
        "test": ("to run the tests", 'pip install -c constraints.txt -e ".[test]"'),
    }
    for extra, names in missing.items():
        purpose, command = purposes[extra]
        advice.append(f"{', '.join(names)} {purpose}: {command}")
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        advice.append(
            "onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both, then "
            "install the one you want"
        )
    if _version("torchvision"):
        advice.append(
            "torchvision is not used, and a CUDA build of it breaks transformers on a CPU build of "
            "torch: pip uninstall torchvision"
        )
    if sys.version_info < (3, 11):
        advice.append("the tested versions are for Python 3.11")
    advice += [f"{trial.name}: {trial.hint}" for trial in trials if trial.hint is not None]
    return tuple(advice)
