"""Every piece there is, as the types of a stage's fields; importing this is what registers them."""

from __future__ import annotations

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
    Choice,
    Merge,
    Rest,
    Schedule,
    Scorer,
    Skip,
    Transform,
    named,
    plugins,
)
from edgevlm.reduce.rests import anchors, neighbours, recycle
from edgevlm.reduce.schedules import cosine, every
from edgevlm.reduce.scorers import (
    attention_delta,
    contrast,
    encoder_attention,
    predictor,
    random,
    router,
    text_attention,
)
from edgevlm.reduce.skips import gated, reweighted
from edgevlm.reduce.transforms import fourier, pool, resize, windows

BUILT_IN = (
    *(attention_delta, contrast, encoder_attention, predictor, random, router, text_attention),
    *(cover, dpp, facility, pivots, relevant_diverse, spread, top, uniform),
    *(anchors, neighbours, recycle),
    *(bipartite, clusters, fuse, registers, resample),
    *(fourier, pool, resize, windows),
    *(gated, reweighted),
    *(cosine, every),
)
plugins()

ScorerField = named(Scorer, "score")
ChoiceField = named(Choice, "selector")
RestField = named(Rest, "rest")
MergeField = named(Merge, "merge")
TransformField = named(Transform, "transform")
SkipField = named(Skip, "skip")
ScheduleField = named(Schedule, "schedule")
