"""Hostile reduction in recipes: refused in one line, or planned; nothing else."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgevlm.errors import EdgeVlmError, PassError, RecipeError
from edgevlm.passes import Reduce
from edgevlm.reduce.options import StageOptions
from tests.attacks.test_recipe import as_yaml
from tests.attacks.test_reduce_recipes import planned
from tests.edgevlm.tiny import tiny_spec

WORDS = (
    *("visionzip", "fastv", "budget", "budget^2", "top", "spread", "random", "uniform", "pool"),
    *("encoder", "projector", "decoder", "input", "nan", ".inf", "1e400", "-1", "0", "''", "~"),
)
KEYS = (*Reduce.model_fields, *StageOptions.model_fields, "top", "lattice", "x")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)
PIECES = st.sampled_from(["uniform", "spread", "cover", "top", "bipartite", "fourier", "avgpool"])
STAGES = st.fixed_dictionaries(
    {"at": st.sampled_from(["encoder.layers", "encoder", "projector", "decoder"])},
    optional={
        "keep": st.integers(-1, 17) | st.floats(-0.1, 1.1) | st.sampled_from(["budget", "x"]),
        "layer": st.integers(-1, 3),
        "depth": st.floats(0, 1),
        "score": st.sampled_from(["random", "text_attention", "encoder_attention"]),
        "select": PIECES,
        "merge": PIECES,
        "transform": PIECES,
        "place": st.sampled_from(["keep", "repack"]),
    },
)


def refused_or_planned(options: object) -> None:
    """One clause and a hint, whatever is wrong; any other error is a failure."""
    step = as_yaml({"reduce": options}, "    ").strip()
    refusal: EdgeVlmError | None = None
    try:
        planned(f"  - {step}\n", tiny_spec())
    except (RecipeError, PassError) as error:
        refusal = error
    if refusal is not None:
        clause = str(refusal).split("\n  hint: ")[0]
        assert "\n" not in clause
        assert isinstance(refusal, PassError) or clause.startswith("recipe.yaml")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_options_with_any_values(options: dict[str, Any]) -> None:
    refused_or_planned(options)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {"stages": st.lists(STAGES, min_size=1, max_size=3)},
        optional={"keep": st.integers(-1, 17) | st.floats(-0.1, 1.1)},
    )
)
def test_stages_that_may_fit(options: dict[str, Any]) -> None:
    refused_or_planned(options)
