"""Budgets: every site its bits, so that the model fits with the least harm that was measured."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Change
from edgevlm.progress import Silent
from edgevlm.quant.calibrate import CalibrationCase
from edgevlm.quant.harm import logits_along, site_harms
from tests.edgevlm.calibrated import quantized, samples_of
from tests.edgevlm.tiny import drawn, tiny_spec

MIB = 2**20


def one_layer() -> VlmSpec:
    spec = tiny_spec()
    decoder = dataclasses.replace(spec.decoder, layers=spec.decoder.layers[:1])
    return dataclasses.replace(spec, decoder=decoder)


@pytest.fixture(scope="module")
def cases() -> list[CalibrationCase]:
    return samples_of(one_layer(), 2)


def run(cases: list[CalibrationCase], **budget: Any) -> tuple[Vlm, Change]:
    model = drawn(one_layer())
    change = quantized(model, {"decoder": "w4a16", "budget": budget}, cases)
    return model, change


def nbytes(model: Vlm, site: str) -> int:
    rows, columns = model.get_submodule(site).get_parameter("weight").shape
    scheme = model.spec.schemes.get(site)
    return 4 * rows * columns if scheme is None else scheme.weights.nbytes(rows, columns)


SITES = [
    f"decoder.layers.0.{part}"
    for part in ("attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down")
]


@pytest.fixture(scope="module")
def choices(cases: list[CalibrationCase]) -> dict[str, list[tuple[str, int, float]]]:
    """Of every site the name of each choice, its bytes, and the harm that it does alone."""
    found: dict[str, list[tuple[str, int, float]]] = {site: [] for site in SITES}
    for scheme in ("w4a16", "w8a16"):
        model = drawn(one_layer())
        quantized(model, {"decoder": scheme}, cases)
        for harm in site_harms(drawn(one_layer()), model, cases, Silent()):
            found[harm.site].append((scheme, nbytes(model, harm.site), harm.kl))
    for site, rows in found.items():
        size = drawn(one_layer()).get_submodule(site).get_parameter("weight").numel()
        rows.append(("float", 4 * size, 0.0))
    return found


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_the_least_harm_that_fits(
    cases: list[CalibrationCase],
    choices: dict[str, list[tuple[str, int, float]]],
    share: float,
) -> None:
    """Against all 243 ways to choose, by the harms of sites alone."""
    least = sum(rows[0][1] for rows in choices.values())
    most = sum(rows[2][1] for rows in choices.values())
    allowed = least + share * (most - least)
    model, change = run(cases, max_mib=(allowed + 0.5) / MIB)
    assert sum(nbytes(model, site) for site in SITES) <= allowed + 0.5
    ways = itertools.product(*choices.values())
    fitting = [way for way in ways if sum(row[1] for row in way) <= allowed + 0.5]
    best = min(sum(row[2] for row in way) for way in fitting)
    assert change.measures["harm"] == pytest.approx(best, rel=1e-6, abs=1e-12)
    names = {
        site: model.spec.schemes[site].name if site in model.spec.schemes else "float"
        for site in SITES
    }
    harm = sum(row[2] for site, rows in choices.items() for row in rows if row[0] == names[site])
    assert harm == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_what_stays_in_float_is_skipped_with_the_reason(cases: list[CalibrationCase]) -> None:
    most = sum(4 * drawn(one_layer()).get_submodule(site).weight.numel() for site in SITES)
    model, change = run(cases, max_mib=(most - 1) / MIB)
    left = set(SITES) - set(model.spec.schemes)
    assert 0 < len(left) < len(SITES)
    assert {change.skipped[site] for site in left} == {
        "the budget has room for it in float, where it does no harm"
    }
    assert set(change.sites) == set(change.schemes) == set(SITES) - left


def test_a_budget_that_float_fits_in_is_an_error(cases: list[CalibrationCase]) -> None:
    with pytest.raises(PassError) as caught:
        run(cases, max_mib=1.0)
    assert str(caught.value).startswith("quantize: matched nothing (")
    assert "the budget has room for it in float, where it does no harm" in str(caught.value)


def test_a_budget_without_samples() -> None:
    with pytest.raises(PassError) as caught:
        run([], max_mib=1.0)
    assert str(caught.value) == (
        "quantize: a budget is measured, and there are no calibration samples\n"
        "  hint: name a folder in calibration.data, or leave it out for the picture world"
    )


def answered(model: Vlm, cases: list[CalibrationCase]) -> list[CalibrationCase]:
    """The same questions with the answers that a model gives."""
    found = []
    for case in cases:
        prompt = case.question.prompt
        with torch.no_grad():
            visual = model.encode(torch.from_numpy(case.question.feeds[0]["pixels"]))[0]
            rows = model.embed(torch.from_numpy(prompt.token_ids), visual)
        stream = model.greedy(rows, torch.from_numpy(prompt.positions))
        tokens = tuple(token for token, _ in itertools.islice(stream, 4))
        found.append(dataclasses.replace(case, answer=tokens))
    return found


def lost(model: Vlm, cases: list[CalibrationCase]) -> float:
    """The share of answers that a model does not give."""
    wrong = [
        tuple(logits.argmax(axis=1)) != case.answer
        for case, logits in zip(cases, logits_along(model, cases), strict=True)
    ]
    return sum(wrong) / len(wrong)


def test_the_fewest_bytes_that_keep_the_answers() -> None:
    """All that may be lost is lost at four bits; where nothing may be, no answer is."""
    cases = answered(drawn(one_layer()), samples_of(one_layer(), 8, seed=3))
    coarse, loose = run(cases, max_accuracy_drop=1.0, finer=("w8a16",))
    assert {scheme.name for scheme in coarse.spec.schemes.values()} == {"w4a16"}
    # Else the test would not tell.
    assert lost(coarse, cases) > 0
    assert loose.measures["accuracy_drop"] == lost(coarse, cases)
    fine, strict = run(cases, max_accuracy_drop=0.0)
    assert lost(fine, cases) == 0
    assert strict.measures["accuracy_drop"] == 0
    sizes = [sum(nbytes(model, site) for site in SITES) for model in (coarse, fine)]
    most = sum(4 * fine.get_submodule(site).get_parameter("weight").numel() for site in SITES)
    assert sizes[0] < sizes[1] < most


def test_an_accuracy_that_no_choice_keeps() -> None:
    cases = answered(drawn(one_layer()), samples_of(one_layer(), 8, seed=3))
    with pytest.raises(PassError) as caught:
        run(cases, max_accuracy_drop=0.0, finer=({"scheme": "w4a16", "group_size": 64},))
    assert str(caught.value) == (
        "quantize: even the gentlest choices lose more than 0.0% of the calibration samples\n"
        "  hint: allow a larger drop, or finer schemes in budget.finer"
    )
