"""Rotary frequencies against transformers' own functions, old field names and new."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edgevlm.families.fields import Fields
from edgevlm.families.rotary import rope_spec
from edgevlm.model.rope import rope_tables
from edgevlm.model.spec import RopeSpec

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3, context as configured": {
        k: v for k, v in LLAMA3.items() if not k.startswith("original")
    },
    "yarn": YARN,
    "yarn, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, magnitudes": YARN | {"mscale": 0.8, "mscale_all_dim": 0.3},
    "yarn, attention factor": YARN | {"attention_factor": 0.7},
}


def read(values: dict[str, Any], head_dim: int) -> RopeSpec:
    fields = Fields(values, family="llava")
    return rope_spec(fields, head_dim=head_dim, max_positions=2048, theta=10000.0)


@pytest.mark.parametrize("head_dim", [16, 24, 80])
@pytest.mark.parametrize("name", KINDS)
def test_frequencies_equal_transformers(name: str, head_dim: int) -> None:
    parameters = KINDS[name] | {"rope_theta": 50000.0}
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters=dict(parameters),
    )
    theirs = LlamaRotaryEmbedding(config)
    new = read({"rope_parameters": parameters}, head_dim)
    # The last bits of a float32 power, and of what is computed from it.
    np.testing.assert_allclose(new.inv_freq, theirs.inv_freq.numpy(), rtol=1e-6)
    assert new.attention_scaling == pytest.approx(theirs.attention_scaling, rel=1e-12)
    old = {key: value for key, value in KINDS[name].items() if key != "rope_type"}
    old["type"] = KINDS[name]["rope_type"]
    assert read({"rope_theta": 50000.0, "rope_scaling": old}, head_dim) == new

    positions = torch.tensor([0, 1, 7, 500, 2047])
    cos, sin = theirs(torch.zeros(1), positions[None])
    # From the very same frequencies: far positions multiply their last bits.
    tables = rope_tables(replace(new, inv_freq=tuple(theirs.inv_freq.tolist())), positions)
    for ours, reference in zip(tables, (cos, sin), strict=True):
        torch.testing.assert_close(ours, reference[0, :, : head_dim // 2], atol=1e-6, rtol=0)


def test_no_rope_fields_are_the_default() -> None:
    assert read({}, 16) == read({"rope_theta": 10000.0, "rope_scaling": None}, 16)


def test_sections_turn_with_their_own_position() -> None:
    rope = RopeSpec(inv_freq=(1.0, 0.5, 0.25, 0.125), sections=(1, 2, 1))
    positions = torch.tensor([[1, 2], [10, 20], [100, 200]])
    cos, sin = rope_tables(rope, positions)
    angles = np.array([[1, 5.0, 2.5, 12.5], [2, 10, 5, 25]])
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)
