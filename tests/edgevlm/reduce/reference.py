"""The decoder by definition, in float64 and numpy, with its stages by their twins.

Every layer is plain arithmetic on whole sequences: no cache, no ops of ours. What a stage makes is
put together row by row, so that positions, state and rows of a call are checked against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgevlm.model.vlm import Vlm
from edgevlm.reduce.apply import numpy_apply_stage
from edgevlm.reduce.plan import Stage
from edgevlm.reduce.seq import Probe, VisSeq
from edgevlm.reduce.view import Call, View
from tests.edgevlm.reduce.deep import Asked

# T rows, P pictures of N tokens, W width, H heads of D numbers

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Rows [T, W] on their way, their positions [T], and where pictures begin among them.

    The prompt's rows are those before `end`.
    """

    x: Array
    positions: Array
    starts: Array
    end: int
    weights: Mapping[str, Array]


class Reference:
    """The layers of a model's decoder."""

    def __init__(self, model: Vlm) -> None:
        """Take the weights."""
        self.spec = model.spec.decoder
        reduction = model.spec.reduction
        self.cuts = () if reduction is None else reduction.cuts
        self.skips = () if reduction is None else reduction.skips
        self.weights = {
            name: weight.detach().double().numpy()
            for name, weight in model.decoder.named_parameters()
        }
        self.frequencies = np.array(self.spec.rope.inv_freq)

    def norm(self, name: str, x: Array, eps: float = 1e-5) -> Array:
        """Rows over their root mean square, scaled."""
        root = np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
        found: Array = x / root * self.weights[f"{name}.weight"]
        return found

    def projected(self, index: int, x: Array) -> tuple[Array, Array, Array]:
        """Queries [T, H, D], keys and values [T, Hkv, D] of a layer, before rotation."""
        attention = self.spec.layers[index].attention
        normed = self.norm(f"layers.{index}.norm1", x)
        packed = normed @ self.weights[f"layers.{index}.attention.qkv.weight"].T
        ends = [attention.q_width, attention.q_width + attention.kv_width]
        q, k, v = (
            part.reshape(len(x), -1, attention.head_dim) for part in np.split(packed, ends, 1)
        )
        return q, k, v

    def turned(self, x: Array, positions: Array) -> Array:
        """Heads [T, H, D] turned: number i with number i + R, by its frequency."""
        angles = positions[:, None] * self.frequencies
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        pairs = len(self.frequencies)
        first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def attention(
        self, index: int, x: Array, positions: Array, hidden: Array | None = None
    ) -> tuple[Array, Array]:
        """What attention adds to rows [T, W], and its shares [H, T, T].

        Keys that are `hidden` [T] are seen by no row; of [T, T] each row has its own.
        """
        attention = self.spec.layers[index].attention
        q, k, v = self.projected(index, x)
        q, k = self.turned(q, positions), self.turned(k, positions)
        groups = attention.num_heads // attention.num_kv_heads
        k, v = (np.repeat(part, groups, 1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) * attention.scale
        closed = np.triu(np.ones((len(x), len(x)), bool), 1)
        if hidden is not None:
            # A row that sees nothing else sees itself, so that its numbers stay finite.
            closed |= hidden & ~np.eye(len(x), dtype=bool)
        scores = np.where(closed, -np.inf, scores)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        out = np.einsum("hts,shd->thd", shares, v).reshape(len(x), -1)
        return out @ self.weights[f"layers.{index}.attention.out.weight"].T, shares

    def layer(self, index: int, x: Array, positions: Array, hidden: Array | None = None) -> Array:
        """Rows [T, W] behind a layer."""
        x = x + self.attention(index, x, positions, hidden)[0]
        return x + self.mlp(index, x)

    def mlp(self, index: int, x: Array) -> Array:
        """What the MLP adds to rows [T, W]."""
        normed = self.norm(f"layers.{index}.norm2", x)
        gate, up = (
            normed @ self.weights[f"layers.{index}.mlp.{part}.weight"].T for part in ("gate", "up")
        )
        found: Array = (gate / (1 + np.exp(-gate)) * up) @ (
            self.weights[f"layers.{index}.mlp.down.weight"].T
        )
        return found

    def routed(self, number: int, tokens: Array) -> Array:
        """Scores [N] of the tokens [N, W] of a picture, by what a stage has learned."""
        learned = f"skips.{number}.learned.router"
        bias = self.weights.get(f"{learned}.bias", np.zeros(1))
        found: Array = tokens @ self.weights[f"{learned}.row"][:, 0] + bias
        return found

    def skipped(self, number: int, lines: Lines) -> Array:
        """Rows [T, W] behind a layer that some tokens of every picture skip: row by row."""
        stage, x = self.skips[number], lines.x
        assert stage.layer is not None
        assert stage.skip is not None
        scores, passes = np.full(len(x), np.nan), np.ones(len(x), bool)
        for start in lines.starts:
            picture = slice(int(start), int(start) + stage.count_in)
            scores[picture] = self.routed(number, x[picture])
            order = sorted(range(picture.start, picture.stop), key=lambda row: -scores[row])
            passes[order[stage.count_out :]] = False
        here = np.flatnonzero(passes)
        added = np.zeros_like(x)
        added[here] = self.attention(stage.layer, x[here], lines.positions[here])[0]
        more = np.zeros_like(x)
        more[here] = self.mlp(stage.layer, x[here] + added[here])
        found = x.copy()
        for row, score in enumerate(scores):
            if np.isnan(score):
                found[row] = x[row] + added[row] + more[row]
            elif stage.skip.name == "gated":
                found[row] = x[row] + score * (added[row] + more[row])
            else:
                weight = getattr(stage.skip, "gain", 0.0) * np.tanh(score) + 1.0
                whole = x[row] + added[row] + weight * more[row]
                found[row] = whole if passes[row] else weight * x[row]
        return found

    def head(self, x: Array) -> Array:
        """Logits [T, V]."""
        found: Array = self.norm("norm", x) @ self.weights["head.weight"].T
        return found

    def run(self, asked: Asked) -> Array:
        """Logits [A + 1, V] of the prompt's last row and of the answer's, with all stages."""
        lines = lines_of(asked)
        before: Probe[Array] | None = None
        cuts = self.cuts if len(asked.starts) else ()
        for index in range(len(self.spec.layers)):
            for cut in cuts:
                if cut.layer == index:
                    lines = self.cut(cut, lines, before)
            before = self.probe(index, lines)
            x = self.layer(index, lines.x, lines.positions)
            for number, skip in enumerate(self.skips if len(asked.starts) else ()):
                if skip.layer == index:
                    x = self.skipped(number, lines)
            lines = replace(lines, x=x)
        return self.head(lines.x[lines.end - 1 :])

    def probe(self, index: int, lines: Lines) -> Probe[Array]:
        """What a layer would attend with."""
        attention = self.spec.layers[index].attention
        q, k, _ = self.projected(index, lines.x)
        angles = lines.positions[:, None] * self.frequencies
        return Probe(
            q=q.reshape(1, len(q), -1),
            k=k.reshape(1, len(k), -1),
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            scale=attention.scale,
            cos=np.cos(angles),
            sin=np.sin(angles),
        )

    def view(self, cut: Stage, lines: Lines, before: Probe[Array] | None) -> View[Array]:
        """What a stage is shown."""
        assert cut.layer is not None
        places = lines.starts[:, None] + np.arange(cut.count_in)
        probes: dict[int | str, Probe[Array]] = {"own": self.probe(cut.layer, lines)}
        if before is not None:
            probes["previous"] = before
        return View(
            tokens=VisSeq(
                features=lines.x[places],
                places=np.tile(np.arange(cut.count_in), (len(places), 1)),
                grid=cut.grid_in,
            ),
            probes=probes,
            call=Call(
                rows=lines.x[None],
                starts=lines.starts,
                last=np.array([lines.end - 1]),
                weights={kind: x[None] for kind, x in lines.weights.items()},
            ),
            normed=self.norm("norm", lines.x)[None],
            learned=self.learned(cut),
        )

    def learned(self, cut: Stage) -> Mapping[str, Mapping[str, Array]]:
        """What the pieces of a stage between layers have learned."""
        found: dict[str, dict[str, Array]] = {}
        for site, weight in self.weights.items():
            before, _, name = site.partition(f"cuts.{self.cuts.index(cut)}.learned.")
            if not before and name:
                piece, _, part = name.partition(".")
                found.setdefault(piece, {})[part] = weight
        return found

    def cut(self, cut: Stage, lines: Lines, before: Probe[Array] | None) -> Lines:
        """Rows behind a stage: text, then the tokens of a picture, and so on."""
        count = cut.count_out
        made = VisSeq(
            features=np.zeros((len(lines.starts), 0, lines.x.shape[1])),
            places=np.zeros((len(lines.starts), 0), np.int64),
        )
        if count == cut.count_in:
            return lines
        if count:
            made = numpy_apply_stage(cut, self.view(cut, lines, before))
        rows: list[Array] = []
        came: list[int] = []
        starts, at = [], 0
        for start, features, places in zip(lines.starts, made.features, made.places, strict=True):
            rows += [*lines.x[at:start]]
            came += range(at, start)
            starts.append(len(rows))
            rows += [*features]
            came += [int(start) + int(place) for place in places]
            at = int(start) + cut.count_in
        rows += [*lines.x[at:]]
        came += range(at, len(lines.x))
        dropped = len(lines.x) - len(rows)
        positions = lines.positions[came]
        if cut.place == "repack":
            first = lines.positions[0]
            positions = first + np.arange(len(rows))
        return Lines(
            x=np.array(rows),
            positions=positions,
            starts=np.array(starts),
            end=lines.end - dropped,
            weights={kind: x[came] for kind, x in lines.weights.items()},
        )


def lines_of(asked: Asked) -> Lines:
    """Rows before the first layer, with those that rate."""
    x = asked.rows[0].double().numpy()
    return Lines(
        x=x,
        positions=asked.positions.numpy().astype(float),
        starts=asked.starts,
        end=asked.num_prompt,
        weights={**asked.weights, "raters": raters(x, asked)},
    )


def raters(x: Array, asked: Asked) -> Array:
    """Ones for the words of the question that visual tokens look at more than at most others."""
    found = np.zeros(len(x), np.float32)
    if not len(asked.starts):
        return found
    question = np.flatnonzero(asked.weights["question"])
    is_visual = asked.weights["text"][: asked.num_prompt] == 0
    visual = np.flatnonzero(is_visual)
    shares = np.exp(x[visual] @ x[question].T)
    shares /= shares.sum(1, keepdims=True)
    looks = shares.mean(0)
    found[question[looks > looks.mean()]] = 1.0
    return found
