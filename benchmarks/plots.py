"""Pictures of benchmark results, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BASELINES = ("random", "uniform")


def pareto(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean accuracy and boxes over average visual tokens, a line per method; the best ones marked.

    A method is marked where no other has at least its accuracy with no more tokens.
    """
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    matplotlib.rcParams["svg.hashsalt"] = "edgevlm"
    from matplotlib import pyplot

    found = [row for row in rows if "mean" in row and not row.get("int8")]
    names = sorted({row["method"] for row in found} - {"dense"})
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.5), sharex=True)
    colours = pyplot.get_cmap("tab20")
    for axis, (title, value) in zip(axes, _VALUES.items(), strict=True):
        for place, name in enumerate(names):
            line = sorted((row["share"], value(row)) for row in found if row["method"] == name)
            shares, values = ([point[part] for point in line] for part in (0, 1))
            style = "--" if name in BASELINES else "-"
            axis.plot(
                [100 * share for share in shares],
                values,
                style,
                color="black" if name in BASELINES else colours(place % 20),
                marker="o" if name not in BASELINES else "x",
                markersize=4,
                linewidth=1.2,
                label=name,
            )
        for row in found:
            if row["method"] == "dense":
                axis.axhline(value(row), color="grey", linewidth=0.8, linestyle=":")
        best = [row for row in found if row["method"] != "dense" and _leads(row, found, value)]
        axis.scatter(
            [100 * row["share"] for row in best],
            [value(row) for row in best],
            s=70,
            facecolors="none",
            edgecolors="black",
        )
        axis.set_xscale("log")
        axis.set_xticks([5.6, 11, 25, 50], ["5.6", "11", "25", "50"])
        axis.set_xlabel("visual tokens, average over layers, % of all")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, ncol=2, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _mean(row: Mapping[str, Any]) -> float:
    return 100 * float(row["mean"])


def _boxes(row: Mapping[str, Any]) -> float:
    return 100 * float(row["tasks"]["box"])


_VALUES = {"mean accuracy, %": _mean, "boxes, %": _boxes}


def _leads(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], value: Any) -> bool:
    """Whether no other row has at least its value with no more tokens."""
    return not any(
        other["tokens"] <= row["tokens"] and value(other) > value(row)
        for other in rows
        if other is not row
    )
