"""What a recipe asks of memory that is no linear map: the cache, and the table of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgevlm.decisions import Decision
from edgevlm.quant.options import BudgetOptions, KvOptions, TableOptions
from edgevlm.quant.spec import DTYPE_BITS, Scheme, WeightQuant

if TYPE_CHECKING:
    from edgevlm.model.spec import VlmSpec
    from edgevlm.quant.assign import Assignment

__all__ = ["budget_decisions", "cache_decisions", "shaped", "table_decisions", "table_scheme"]


def shaped(
    spec: VlmSpec,
    schemes: Mapping[str, Scheme],
    kv: KvOptions | None,
    table: TableOptions | None,
) -> VlmSpec:
    """A spec with these schemes, this cache and this table."""
    from edgevlm.model.spec import KvQuant

    decoder = spec.decoder
    if kv is not None:
        quant = KvQuant(dtype=kv.dtype, granularity=kv.granularity)
        layers = tuple(
            replace(layer, attention=replace(layer.attention, kv=quant)) for layer in decoder.layers
        )
        decoder = replace(decoder, layers=layers)
    scheme = None if table is None else table_scheme(table)
    return replace(spec, schemes=dict(schemes), decoder=decoder, table=scheme)


def table_scheme(options: TableOptions) -> Scheme:
    """The scheme of a table: rows are looked up, and multiplied by nothing."""
    bits = DTYPE_BITS[options.dtype]
    weights = WeightQuant(dtype=options.dtype, bits=bits, group_size=options.group_size)
    return Scheme(name=f"w{bits}a16", weights=weights)


def cache_decisions(
    kv: KvOptions | None, spec: VlmSpec, targets: Sequence[str], *, has_prefill: bool
) -> list[Decision]:
    """What becomes of a quantized cache; `has_prefill` says that prompts have a graph of theirs."""
    from edgevlm_export.forms import FORMS

    if kv is None:
        return []
    asked = f"kv {kv.dtype} per {kv.granularity}"
    for target in targets:
        known = FORMS[target].caches
        if kv.dtype not in known:
            return [
                Decision(
                    asked=f"{asked} on {target!r}",
                    outcome="refused",
                    reason=f"its steps keep {', '.join(known)} only",
                    effect=f"choose kv: {known[0]}, or another target",
                )
            ]
    numbers = sum(
        2 * layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.decoder.layers
    )
    effect = (
        f"a row takes {numbers * DTYPE_BITS[kv.dtype] // 8:,} bytes of the cache instead of "
        f"{4 * numbers:,}"
    )
    if not has_prefill and any(FORMS[target].state == "inplace" for target in targets):
        # Measured with 256 rows of 15 heads: the kernel restores the cache for every row.
        effect += (
            "; prompts are read by the step's kernel, whose attention is 2 to 6 times slower over "
            "such a cache: with prefill they have a graph that is not"
        )
    return [
        Decision(
            asked=asked,
            outcome="applied",
            reason="scales are constants from calibration",
            effect=effect,
        )
    ]


def budget_decisions(
    budget: BudgetOptions | None, assignment: Assignment, spec: VlmSpec
) -> list[Decision]:
    """What a budget can come to, before anything is measured."""
    from edgevlm.quant.sites import linear_sites

    if budget is None:
        return []
    sites = linear_sites(spec)
    shapes = {site: (sites[site].rows, sites[site].columns) for site in assignment.schemes}
    least = sum(assignment.schemes[site].weights.nbytes(*shapes[site]) for site in shapes) / 2**20
    if budget.max_mib is not None and budget.max_mib < least:
        return [
            Decision(
                asked=f"budget of {budget.max_mib:g} MiB",
                outcome="refused",
                reason=f"the coarsest schemes take {least:,.1f} MiB",
                effect=f"set budget.max_mib to at least {least:.1f}, or ask for fewer bits",
            )
        ]
    bound = (
        f"at most {budget.max_mib:g} MiB"
        if budget.max_mib is not None
        else f"at most {budget.max_accuracy_drop or 0.0:.1%} of the calibration samples lost"
    )
    choices = ", ".join(wish if isinstance(wish, str) else wish.scheme for wish in budget.finer)
    return [
        Decision(
            asked=f"budget: {bound}",
            outcome="applied",
            reason=f"{len(shapes)} sites may be raised to {choices}",
            effect=f"linear maps take {least:,.1f} MiB or more, as calibration decides",
        )
    ]


def table_decisions(
    table: TableOptions | None, spec: VlmSpec, targets: Sequence[str]
) -> list[Decision]:
    """What becomes of a quantized table of embeddings; `spec` is the model's after it."""
    from edgevlm.sizes import shares_table
    from edgevlm_export.forms import FORMS

    if table is None:
        return []
    decoder = spec.decoder
    scheme = table_scheme(table)
    size = scheme.weights.nbytes(decoder.vocab_size, decoder.width)
    effect = f"{size / 2**20:,.1f} MiB instead of {decoder.vocab_size * decoder.width / 2**18:,.1f}"
    shared = [name for name in targets if shares_table(spec, FORMS[name].state)]
    if shared:
        effect += ", which the head reads too"
        effect += "" if len(shared) == len(targets) else f" on {', '.join(map(repr, shared))}"
    return [
        Decision(
            asked=f"embedding {table.dtype}",
            outcome="applied",
            reason="the runtime restores rows as they are looked up",
            effect=effect,
        )
    ]
