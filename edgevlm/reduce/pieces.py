"""Every piece there is, as the types of a stage's fields; importing this is what registers them."""

from __future__ import annotations

from edgevlm.reduce.choices import cover, spread, top, uniform
from edgevlm.reduce.merges import bipartite
from edgevlm.reduce.piece import Choice, Merge, Rest, Scorer, Transform, named, plugins
from edgevlm.reduce.rests import anchors
from edgevlm.reduce.scorers import encoder_attention, random, text_attention
from edgevlm.reduce.transforms import fourier, pool, resize

BUILT_IN = (
    *(encoder_attention, random, text_attention),
    *(cover, spread, top, uniform),
    *(anchors, bipartite, fourier, pool, resize),
)
plugins()

ScorerField = named(Scorer, "score")
ChoiceField = named(Choice, "selector")
RestField = named(Rest, "rest")
MergeField = named(Merge, "merge")
TransformField = named(Transform, "transform")
