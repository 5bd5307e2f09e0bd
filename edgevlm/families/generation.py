"""Defaults of generation, from `generation_config.json` or, in old checkpoints, the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.errors import ModelError
from edgevlm.model.spec import GenerationSpec

# Read, or about the caller's side of transformers' `generate`: nothing that a bundle would do.
KNOWN = frozenset(
    [
        "_from_model_config",
        "bos_token_id",
        "cache_implementation",
        "do_sample",
        "eos_token_id",
        "max_length",
        "max_new_tokens",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "return_dict_in_generate",
        "temperature",
        "top_k",
        "top_p",
        "transformers_version",
        "use_cache",
    ]
)
# Values with which the other fields change nothing.
NEUTRAL: tuple[object, ...] = (None, False, 0, 1, 1.0, 0.0, [], {})


def generation_spec(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> tuple[GenerationSpec, tuple[str, ...]]:
    """The defaults, and a clause for each wish of the checkpoint that a bundle does not fulfil."""
    sections = (generation or {}, config, config.get("text_config") or {})
    eos: object = next(
        (s["eos_token_id"] for s in sections if s.get("eos_token_id") is not None), []
    )
    pad = next((s["pad_token_id"] for s in sections if s.get("pad_token_id") is not None), None)
    eos = [eos] if isinstance(eos, int) else eos
    if not isinstance(eos, list) or not all(type(token) is int for token in eos):
        raise ModelError(
            f"generation_config.json: 'eos_token_id' is {eos!r}, expected token ids",
            hint="take it from the checkpoint's own repository",
        )
    wishes = generation or {}
    sampled = bool(wishes.get("do_sample", False))
    notes = [
        f"generation_config.json asks for {name} = {value!r}, which a bundle does not do"
        for name, value in sorted(wishes.items())
        if name not in KNOWN and value not in NEUTRAL
    ]
    spec = GenerationSpec(
        eos_token_ids=tuple(eos),
        pad_token_id=pad,
        max_new_tokens=wishes.get("max_new_tokens")
        or GenerationSpec(eos_token_ids=()).max_new_tokens,
        temperature=float(wishes.get("temperature") or 1.0) if sampled else 0.0,
        top_k=(wishes.get("top_k", 50) or None) if sampled else None,
        top_p=wishes.get("top_p") if sampled else None,
    )
    return spec, tuple(notes)
