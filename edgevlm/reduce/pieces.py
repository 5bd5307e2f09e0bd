"""Every piece there is, as the types of a stage's fields; importing this is what registers them."""

from __future__ import annotations

from edgevlm.reduce.bottlenecks import learned_rows
from edgevlm.reduce.choices import (
    cover,
    dpp,
    facility,
    pivots,
    relevant_diverse,
    spread,
    top,
    uniform,
)
from edgevlm.reduce.merges import bipartite, clusters, fuse, registers, resample
from edgevlm.reduce.piece import (
    Bottleneck,
    Choice,
    Merge,
    Rest,
    Scorer,
    Transform,
    named,
    plugins,
)
from edgevlm.reduce.rests import anchors, neighbours, recycle
from edgevlm.reduce.scorers import (
    attention_delta,
    contrast,
    encoder_attention,
    predictor,
    random,
    text_attention,
)
from edgevlm.reduce.transforms import fourier, pool, resize, windows

BUILT_IN = (
    *(attention_delta, contrast, encoder_attention, predictor, random, text_attention),
    *(cover, dpp, facility, pivots, relevant_diverse, spread, top, uniform),
    *(anchors, neighbours, recycle),
    *(bipartite, clusters, fuse, registers, resample),
    *(fourier, pool, resize, windows),
    learned_rows,
)
plugins()

ScorerField = named(Scorer, "score")
ChoiceField = named(Choice, "selector")
RestField = named(Rest, "rest")
MergeField = named(Merge, "merge")
TransformField = named(Transform, "transform")
BottleneckField = named(Bottleneck, "bottleneck")
