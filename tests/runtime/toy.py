"""A toy decoder of attention, convolution and MLP layers: the same weights as ONNX and as numpy.

The numpy side is the reference: float64, row by row, with plain lists as state. The ONNX side is
built by hand with `onnx.helper`, in both forms of step graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm_runtime.manifest import GraphSpec, RopeSpec, StateGroup, StateTensor, TensorSpec
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.reduction import Reduction, kept_rows

Array = NDArray[Any]

WIDTH, HEADS, HEAD_DIM, TAPS, VOCAB = 32, 2, 16, 3, 400
ROPE = RopeSpec(inv_freq=tuple(float(0.5 ** (2 * i)) for i in range(HEAD_DIM // 2)))

# B batch (1), T rows of a call, S slots, one key-value head


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """`attention` (its cache in a group), `conv` (its columns in a group) or `mlp`."""

    kind: str
    name: str
    group: str = "main"


PLAIN = (
    Layer(kind="attention", name="0"),
    Layer(kind="mlp", name="1"),
    Layer(kind="attention", name="2"),
)


def toy_weights(layers: Sequence[Layer], seed: int) -> dict[str, Array]:
    """Seeded weights, large enough that logits differ clearly."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Array:
        return (random.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

    weights = {"head": matrix(WIDTH, VOCAB)}
    for layer in layers:
        if layer.kind == "attention":
            for part, columns in (("q", HEADS * HEAD_DIM), ("k", HEAD_DIM), ("v", HEAD_DIM)):
                weights[f"{layer.name}.{part}"] = matrix(WIDTH, columns)
            weights[f"{layer.name}.out"] = matrix(HEADS * HEAD_DIM, WIDTH)
        elif layer.kind == "conv":
            weights[f"{layer.name}.in"] = matrix(WIDTH, WIDTH)
            weights[f"{layer.name}.taps"] = matrix(TAPS, WIDTH)
            weights[f"{layer.name}.out"] = matrix(WIDTH, WIDTH)
        else:
            weights[f"{layer.name}.up"] = matrix(WIDTH, 2 * WIDTH)
            weights[f"{layer.name}.down"] = matrix(2 * WIDTH, WIDTH)
    return weights


def toy_table(seed: int = 7) -> Array:
    """The token embedding."""
    table = np.random.default_rng(seed).standard_normal((VOCAB, WIDTH))
    return table.astype(np.float32)


@dataclass(kw_only=True, slots=True)
class Reference:
    """The decoder in float64, row by row; positions of `packed` groups count the rows they got."""

    layers: Sequence[Layer]
    rope: RopeSpec = ROPE
    packed: Collection[str] = ()
    memory: dict[str, list[Array]] = field(default_factory=dict)

    def call(
        self,
        weights: Mapping[str, Array],
        embeds: Array,
        positions: Array,
        dropped: Mapping[str, int] | None = None,
        gone: Mapping[str, Collection[int]] | None = None,
    ) -> tuple[Array, Array]:
        """Logits and hidden rows of a call, of those rows that reached the end.

        A group never gets its first `dropped` rows, nor those that are `gone`.
        """
        first = dict.fromkeys((layer.group for layer in self.layers), 0) | dict(dropped or {})
        logits, hiddens = [], []
        for row, (embed, position) in enumerate(zip(embeds, positions, strict=True)):
            x = embed.astype(np.float64)
            for layer in self.layers:
                if row < first[layer.group] or row in (gone or {}).get(layer.group, ()):
                    break
                x = x + self._layer(layer, weights, x, np.atleast_1d(position))
            else:
                hiddens.append(x)
                logits.append(x @ weights["head"])
        return np.array(logits), np.array(hiddens)

    def _layer(
        self, layer: Layer, weights: Mapping[str, Array], x: Array, position: Array
    ) -> Array:
        def weight(part: str) -> Array:
            return weights[f"{layer.name}.{part}"].astype(np.float64)

        if layer.kind == "mlp":
            return np.maximum(x @ weight("up"), 0) @ weight("down")
        if layer.kind == "conv":
            columns = self.memory.setdefault(layer.name, [np.zeros(WIDTH)] * (TAPS - 1))
            columns.append(x @ weight("in"))
            return (np.array(columns[-TAPS:]) * weight("taps")).sum(0) @ weight("out")
        cache = self.memory.setdefault(layer.name, [])
        if layer.group in self.packed:
            position = np.array([len(cache)])
        key = self._rotated(x @ weight("k"), position)
        cache.append(np.concatenate([key, x @ weight("v")]))
        keys, values = np.split(np.array(cache), 2, axis=1)
        heads = []
        for head in np.split(x @ weight("q"), HEADS):
            scores = keys @ self._rotated(head, position) / HEAD_DIM**0.5
            shares = np.exp(scores - scores.max())
            heads.append(shares / shares.sum() @ values)
        return np.concatenate(heads) @ weight("out")

    def _rotated(self, head: Array, position: Array) -> Array:
        axes = np.repeat(position, self.rope.sections or len(self.rope.inv_freq))
        angles = axes * np.array(self.rope.inv_freq)
        cos, sin = np.cos(angles), np.sin(angles)
        one, two = np.split(head, 2)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin])


def toy_groups(
    layers: Sequence[Layer], capacities: Mapping[str, int], cache: str
) -> tuple[StateGroup, ...]:
    """The state of these layers; `cache` is `kv_inplace`, `kv_delta` or `kv_window`."""
    groups = []
    for group, capacity in capacities.items():
        tensors = []
        for layer in layers:
            if layer.group != group or layer.kind == "mlp":
                continue
            if layer.kind == "conv":
                shape = (1, WIDTH, TAPS - 1)
                tensors.append(_tensor(f"conv.{layer.name}", "conv", shape))
            else:
                shape = (1, 1, capacity, HEAD_DIM)
                tensors.append(_tensor(f"key.{layer.name}", cache, shape))
                tensors.append(_tensor(f"value.{layer.name}", cache, shape))
        groups.append(StateGroup(name=group, capacity=capacity, tensors=tuple(tensors)))
    return tuple(groups)


def _tensor(name: str, kind: str, shape: tuple[int, ...]) -> StateTensor:
    return StateTensor(
        name=name,
        kind=kind,
        input=f"past.{name}",
        output=f"new.{name}",
        dtype="float32",
        shape=shape,
    )


def delta_graph(
    graph: OnnxGraph,
    layers: Sequence[Layer],
    weights: Mapping[str, Array],
    capacities: Mapping[str, int],
    *,
    rows: int,
    num_logits: int,
    dropped: Mapping[str, int] | None = None,
    hidden: bool = False,
    extra_input: str | None = None,
    reduction: Reduction | None = None,
    packed: Collection[str] = (),
    **fields: Any,
) -> GraphSpec:
    """A step graph of fixed rows that returns new rows; standard ops only."""
    dropped = dropped or {}
    x = graph.input("inputs_embeds", "float32", (1, rows, WIDTH), "embeds")
    if extra_input is not None:
        extra = graph.input(extra_input, "float32", (1, rows, WIDTH), f"output:{extra_input}")
        x = graph.node("Add", x, extra)
    half = (rows, HEAD_DIM // 2)
    tables = [graph.input(name, "float32", half, name) for name in ("rope_cos", "rope_sin")]
    wanted = graph.input("logit_rows", "int64", (num_logits,), "logit_rows")
    gone = 0
    masks: dict[str, str] = {}
    turned: list[str] = []
    for layer in layers:
        missing = dropped.get(layer.group, 0) - gone
        if missing > 0:
            x = graph.slice(x, 1, missing, rows)
            tables = [graph.slice(table, 0, missing, rows) for table in tables]
            wanted = graph.node("Sub", wanted, graph.const(np.array([missing], np.int64)))
            gone += missing
        if reduction is not None and layer.group == reduction.group and not gone:
            assert isinstance(reduction.pictures, int), "fixed rows, fixed pictures"
            kept, places = kept_rows(graph, x, rows, reduction)
            x = graph.node("Gather", x, kept, axis=1)
            tables = [graph.node("Gather", table, kept, axis=0) for table in tables]
            wanted = graph.node("Gather", places, wanted)
            gone = reduction.dropped * reduction.pictures
        if layer.group in packed and layer.group not in turned:
            turned.append(layer.group)
            tables = _packed_tables(graph, layer.group, rows - gone)
        if layer.kind == "attention":
            slots = capacities[layer.group]
            if layer.group not in masks:
                shape = (1, 1, rows - gone, slots + rows - gone)
                name = f"mask.{layer.group}"
                masks[layer.group] = graph.input(name, "float32", shape, f"mask:{layer.group}")
            change = _delta_attention(
                graph, layer, weights, x, tables, masks[layer.group], slots, rows - gone
            )
        elif layer.kind == "conv":
            change = _conv(graph, layer, weights, x, rows - gone)
        else:
            change = _mlp(graph, layer, weights, x)
        x = graph.node("Add", x, change)
    if hidden:
        graph.output(x, "hidden", "float32", (1, rows - gone, WIDTH))
    picked = graph.node("Gather", x, wanted, axis=1)
    graph.output(
        graph.node("MatMul", picked, graph.const(weights["head"])),
        "logits",
        "float32",
        (1, num_logits, VOCAB),
    )
    if reduction is not None:
        dropped = {reduction.group: reduction.dropped}
    return graph.finish(rows=rows, mask="additive", dropped=dropped, **fields)


def inplace_graph(
    graph: OnnxGraph,
    layers: Sequence[Layer],
    weights: Mapping[str, Array],
    capacities: Mapping[str, int],
    *,
    reduction: Reduction | None = None,
    packed: Collection[str] = (),
    **fields: Any,
) -> GraphSpec:
    """A step graph of any number of rows, on GroupQueryAttention."""
    x = graph.input("inputs_embeds", "float32", (1, "T", WIDTH), "embeds")
    most = max(capacities.values())
    half = (most, HEAD_DIM // 2)
    tables = [graph.input(name, "float32", half, name) for name in ("rope_cos", "rope_sin")]
    lengths: dict[str, list[str]] = {}
    for group in capacities:
        of = "" if group == "main" else f".{group}"
        last = graph.input(f"seqlens_k{of}", "int32", (1,), f"last_slot:{group}")
        total = graph.input(f"total_sequence_length{of}", "int32", (), f"total:{group}")
        lengths[group] = [last, total]
    wanted = graph.input("logit_rows", "int64", ("R",), "logit_rows")
    order = _order(graph, x)
    turned: list[str] = []
    kept = ""
    for layer in layers:
        if reduction is not None and layer.group == reduction.group and not kept:
            kept, places = kept_rows(graph, x, "T", reduction)
            x = graph.node("Gather", x, kept, axis=1)
            wanted = graph.node("Gather", places, wanted)
            # The operator wants a table of as many rows as there are slots.
            wider = graph.const(np.array([0, 0, most, 0]))
            tables = [
                graph.node("Pad", graph.node("Gather", table, kept), wider) for table in tables
            ]
            order = _order(graph, x)
        if layer.group in packed and layer.group not in turned:
            turned.append(layer.group)
            tables = _packed_tables(graph, layer.group, most)
        if layer.kind == "attention":
            parts = [_linear(graph, layer, weights, part, x) for part in ("q", "k", "v")]
            shape = (1, 1, capacities[layer.group], HEAD_DIM)
            names = [f"{part}.{layer.name}" for part in ("key", "value")]
            past = [
                graph.input(f"past.{name}", "float32", shape, f"state:{name}") for name in names
            ]
            for name in names:
                graph.outputs.append(TensorSpec(name=f"new.{name}", dtype="float32", shape=shape))
            out = graph.node(
                "GroupQueryAttention",
                *parts,
                *past,
                *lengths[layer.group],
                *tables,
                order,
                domain="com.microsoft",
                outputs=(f"core.{layer.name}", *(f"new.{name}" for name in names)),
                num_heads=HEADS,
                kv_num_heads=1,
                do_rotary=1,
            )
            change = _linear(graph, layer, weights, "out", out)
        else:
            change = _mlp(graph, layer, weights, x)
        x = graph.node("Add", x, change)
    picked = graph.node("Gather", x, wanted, axis=1)
    logits = graph.node("MatMul", picked, graph.const(weights["head"]))
    graph.output(logits, "logits", "float32", (1, "R", VOCAB))
    dropped = {} if reduction is None else {reduction.group: reduction.dropped}
    return graph.finish(dropped=dropped, **fields)


def _order(graph: OnnxGraph, x: str) -> str:
    """The numbers of the rows of x [1, T, W]."""
    zero, one = graph.const(np.array(0)), graph.const(np.array(1))
    first = graph.const(np.array([0]))
    num_rows = graph.node("Squeeze", graph.node("Shape", x, start=1, end=2), first)
    return graph.node("Unsqueeze", graph.node("Range", zero, num_rows, one), first)


def _packed_tables(graph: OnnxGraph, group: str, rows: int) -> list[str]:
    half = (rows, HEAD_DIM // 2)
    names = (f"rope_cos:{group}", f"rope_sin:{group}")
    return [graph.input(name.replace(":", "."), "float32", half, name) for name in names]


def _linear(graph: OnnxGraph, layer: Layer, weights: Mapping[str, Array], part: str, x: str) -> str:
    return graph.node("MatMul", x, graph.const(weights[f"{layer.name}.{part}"]))


def _mlp(graph: OnnxGraph, layer: Layer, weights: Mapping[str, Array], x: str) -> str:
    up = graph.node("Relu", _linear(graph, layer, weights, "up", x))
    return _linear(graph, layer, weights, "down", up)


def _conv(graph: OnnxGraph, layer: Layer, weights: Mapping[str, Array], x: str, rows: int) -> str:
    name = f"conv.{layer.name}"
    past = graph.input(f"past.{name}", "float32", (1, WIDTH, TAPS - 1), f"state:{name}")
    columns = graph.node("Transpose", _linear(graph, layer, weights, "in", x), perm=[0, 2, 1])
    wide = graph.node("Concat", past, columns, axis=2)
    graph.output(wide, f"new.{name}", "float32", (1, WIDTH, TAPS - 1 + rows))
    taps = graph.const(weights[f"{layer.name}.taps"].T[:, None])
    mixed = graph.node("Transpose", graph.node("Conv", wide, taps, group=WIDTH), perm=[0, 2, 1])
    return _linear(graph, layer, weights, "out", mixed)


def _delta_attention(
    graph: OnnxGraph,
    layer: Layer,
    weights: Mapping[str, Array],
    x: str,
    tables: Sequence[str],
    mask: str,
    slots: int,
    rows: int,
) -> str:
    cos, sin = tables

    def heads(part: str, count: int) -> str:
        flat = _linear(graph, layer, weights, part, x)
        shaped = graph.node("Reshape", flat, graph.const(np.array([1, rows, count, HEAD_DIM])))
        return graph.node("Transpose", shaped, perm=[0, 2, 1, 3])

    def rotated(head: str) -> str:
        one = graph.slice(head, 3, 0, HEAD_DIM // 2)
        two = graph.slice(head, 3, HEAD_DIM // 2, HEAD_DIM)
        left = graph.node("Sub", graph.node("Mul", one, cos), graph.node("Mul", two, sin))
        right = graph.node("Add", graph.node("Mul", two, cos), graph.node("Mul", one, sin))
        return graph.node("Concat", left, right, axis=3)

    query, new = rotated(heads("q", HEADS)), (rotated(heads("k", 1)), heads("v", 1))
    both = []
    for part, value in zip(("key", "value"), new, strict=True):
        name = f"{part}.{layer.name}"
        past = graph.input(f"past.{name}", "float32", (1, 1, slots, HEAD_DIM), f"state:{name}")
        graph.output(value, f"new.{name}", "float32", (1, 1, rows, HEAD_DIM))
        both.append(graph.node("Concat", past, value, axis=2))
    scaled = graph.node("Mul", query, graph.const(np.array(HEAD_DIM**-0.5, np.float32)))
    scores = graph.node("MatMul", scaled, graph.node("Transpose", both[0], perm=[0, 1, 3, 2]))
    shares = graph.node("Softmax", graph.node("Add", scores, mask), axis=-1)
    mixed = graph.node("Transpose", graph.node("MatMul", shares, both[1]), perm=[0, 2, 1, 3])
    flat = graph.node("Reshape", mixed, graph.const(np.array([1, rows, HEADS * HEAD_DIM])))
    return _linear(graph, layer, weights, "out", flat)
