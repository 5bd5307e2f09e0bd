"""Memory that a full cache really takes: what the process grows by, against the plan's bytes.

Graphs are loaded and run once, on another state, so that weights, packed copies and scratch are
there already. Then every slot is filled, a few rows a call. Usage:

    edgevlm compile recipes/smolvlm-500m-w4.yaml -o build/smolvlm-500m-w4
    python benchmarks/resident.py build/smolvlm-500m-w4
"""

from __future__ import annotations

import gc
from pathlib import Path

from paired import parser, report

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import open_decoder
from edgevlm_runtime.decode.protocol import Decoder
from edgevlm_runtime.engine import Engines
from edgevlm_runtime.engines.table import open_table

ROWS = 8
"""Rows of a call: scratch that grows with rows times slots stays small."""


def main() -> None:
    """Fill the cache, and print what it took."""
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    arguments = options.parse_args()
    bundle = Bundle.open(arguments.bundle, "ort")
    engines = Engines(bundle)
    graphs = bundle.variant.graphs
    table = open_table(bundle, next(graph for graph in graphs if graph.role == "embedding"))
    warm = open_decoder(bundle, engines, table)
    fill(warm, warm.capacity)
    # Its state goes; what the sessions allocated for the longest call stays.
    del warm
    gc.collect()
    before = dirty_bytes()
    decoder = open_decoder(bundle, engines, table)
    slots = fill(decoder, decoder.capacity)
    after = dirty_bytes()
    (group,) = bundle.variant.state
    figures = {
        "slots": slots,
        "dtype": group.tensors[0].dtype,
        "planned_bytes": group.nbytes,
        "resident_bytes": after - before,
        "resident_over_planned": (after - before) / group.nbytes,
    }
    report("resident", figures, arguments)


def fill(decoder: Decoder, slots: int) -> int:
    """Consume tokens up to a number of rows."""
    while decoder.length < slots:
        count = min(ROWS, slots - decoder.length)
        decoder.extend([1] * count, rows=[count - 1])
    return decoder.length


def dirty_bytes() -> int:
    """Pages of this process that are its own: no files, nothing shared."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


if __name__ == "__main__":
    main()
