"""A variant's written graphs as a witness, run one by one through the runtime's engines.

Between the graphs stands nothing of the runtime's session: pictures come prepared, the decoder is
fed the parent's visual tokens, and the answer is the parent's, one token a call, so that prefill
and decode graphs both speak. The vision graph is run from a copy whose features are an output too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgevlm.evidence.eager import first_difference
from edgevlm.evidence.fault import tapped_runs
from edgevlm.evidence.witness import Question, Witness
from edgevlm.model.plans import FINE
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import open_decoder
from edgevlm_runtime.decode.protocol import Decoder, Prompt
from edgevlm_runtime.encoder import question_rows
from edgevlm_runtime.engine import Engines, as_input
from edgevlm_runtime.engines.table import open_table
from edgevlm_runtime.manifest import GraphSpec, TensorSpec
from edgevlm_runtime.positions import placed_positions
from edgevlm_runtime.text import TextSpec

FEATURES = "vision"
"""Nodes of this part of the model put out what those of the projector read."""


class GraphWitness:
    """One variant of a bundle, opened for measuring."""

    def __init__(self, folder: Path, variant: str) -> None:
        """Open the variant; `folder` holds a whole bundle, published or not."""
        self._bundle = Bundle.open(folder, variant)
        self._folder = folder
        embedding = next(g for g in self._bundle.variant.graphs if g.role == "embedding")
        self._table = open_table(self._bundle, embedding)
        # Not a session: it would hold the vision graph a second time.
        self._rule = TextSpec.from_json(self._bundle.manifest.text).positions
        rope = self._bundle.variant.rope
        self._num_axes = None if rope is None else rope.num_axes
        self._decoder: Decoder = open_decoder(self._bundle, Engines(self._bundle), self._table)

    def answer(self, question: Question, parent: Witness) -> Witness:
        """Put the question to the graphs, along the parent's answer."""
        vision, projector = self._pictures(question)
        logits_RV = self._logits(question, parent)
        best = tuple(int(token) for token in logits_RV.argmax(axis=1))
        parting = first_difference(best, parent.answer)
        # Up to and including the first token that differs, the rows are those of a free answer.
        return Witness(
            vision=vision,
            projector=projector,
            answer=best[: parting + 1],
            logits=logits_RV,
        )

    def _logits(self, question: Question, parent: Witness) -> NDArray[np.float32]:
        decoder = self._decoder
        decoder.rewind(0)
        embeds = self._table.rows(question.prompt.token_ids)
        visual = parent.fed or parent.projector
        if visual:
            embeds[question.prompt.image_rows] = np.concatenate(visual)
        if parent.texts:
            is_text = np.ones(len(embeds), bool)
            is_text[question.prompt.image_rows] = False
            embeds[is_text] = np.mean(parent.texts, axis=0)
        encoded = question.prompt
        positions, next_position = encoded.positions, encoded.next_position
        if parent.offsets:
            positions, next_position = placed_positions(
                len(embeds),
                encoded.image_rows,
                [image.layout for image in question.images],
                self._rule,
                parent.offsets,
                self._num_axes,
            )
        prompt = Prompt(
            embeds=embeds,
            positions=positions,
            next_position=next_position,
            picture_rows=encoded.picture_rows,
            row_weights=encoded.row_weights,
            values={FINE: np.stack(parent.fine)[None]} if parent.fine else {},
        )
        rows = [decoder.prefill(prompt).logits[-1].copy()]
        for token in parent.answer[:-1]:
            rows.append(decoder.extend([token]).logits[-1].copy())
        return np.stack(rows)

    def _pictures(
        self, question: Question
    ) -> tuple[tuple[NDArray[np.float32], ...], tuple[NDArray[np.float32], ...]]:
        vision, projector = [], []
        asked = self._asked(question)
        for image in question.images:
            graph = self._vision_graph(image.layout.grid)
            path = self._folder / graph.file
            tapped = crossing_values(onnx.load(path, load_external_data=False))
            wanted = [graph.outputs[0].name, *tapped]
            calls = [
                {spec.name: self._input(spec, {**asked, **feed}) for spec in graph.inputs}
                for feed in image.feeds
            ]
            for outputs in tapped_runs(path, wanted, calls, graph.engine.options):
                tokens = outputs[wanted[0]]
                projector.append(tokens.reshape(-1, tokens.shape[-1]))
                # A projector that reads several values has no one input to compare.
                if len(tapped) == 1:
                    features = outputs[tapped[0]]
                    vision.append(features.reshape(-1, features.shape[-1]))
        return tuple(vision), tuple(projector)

    @staticmethod
    def _input(spec: TensorSpec, values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The value of an input, by its source."""
        value = values[spec.source]
        if spec.source.startswith("question_"):
            value = question_rows(spec, value)
        return as_input(value, spec)

    def _asked(self, question: Question) -> dict[str, NDArray[np.float32]]:
        """The text rows of a prompt and their weights, by source."""
        prompt = question.prompt
        is_text = np.ones(len(prompt.token_ids), bool)
        is_text[prompt.image_rows] = False
        rows = self._table.rows(prompt.token_ids)[is_text]
        weights = {
            f"question_weights:{kind}": given[is_text][None]
            for kind, given in prompt.row_weights.items()
        }
        return {"question_embeds": rows[None], **weights}

    def _vision_graph(self, grid: tuple[int, int] | None) -> GraphSpec:
        graphs = [graph for graph in self._bundle.variant.graphs if graph.role == "vision"]
        return next(graph for graph in graphs if graph.grid is None or graph.grid == grid)


def crossing_values(model: onnx.ModelProto, part: str = FEATURES) -> list[str]:
    """Values that nodes of one part of the model put out and nodes of other parts read."""
    makers = {output: node.name for node in model.graph.node for output in node.output if output}
    found: list[str] = []
    for node in model.graph.node:
        if _part(node.name) in (part, "plumbing"):
            continue
        for value in node.input:
            if _part(makers.get(value, "")) == part and value not in found:
                found.append(value)
    return found


def _part(name: str) -> str:
    return name.split(".")[0].split("/")[0]
