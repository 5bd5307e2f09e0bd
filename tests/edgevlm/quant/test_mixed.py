"""Mixed precision against all assignments there are."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.errors import PassError
from edgevlm.quant.mixed import Choice, Mix, least_bytes, least_harm

Options = dict[str, list[Choice]]

# Harms that add up without rounding, so that a budget can be met exactly.
CHOICES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(-8, 64).map(lambda eighths: eighths / 8)),
    min_size=1,
    max_size=4,
)


def options_of(tables: Sequence[Sequence[tuple[int, float]]]) -> Options:
    return {
        f"site{index}": [
            Choice(name=f"choice{place}", nbytes=nbytes, harm=harm)
            for place, (nbytes, harm) in enumerate(table)
        ]
        for index, table in enumerate(tables)
    }


def assignments(
    options: Options, together: Sequence[Sequence[str]] = ()
) -> list[tuple[int, float]]:
    """Bytes and harm of everything that may be chosen."""
    found = []
    for picks in itertools.product(*options.values()):
        names = dict(zip(options, (pick.name for pick in picks), strict=True))
        if all(len({names[site] for site in group}) == 1 for group in together):
            found.append((sum(p.nbytes for p in picks), math.fsum(p.harm for p in picks)))
    return found


def check(mix: Mix, options: Options) -> None:
    """The sums are those of the choices."""
    assert list(mix.choices) == list(options)
    picks = [
        next(choice for choice in options[site] if choice.name == name)
        for site, name in mix.choices.items()
    ]
    assert mix.nbytes == sum(pick.nbytes for pick in picks)
    assert mix.harm == pytest.approx(math.fsum(pick.harm for pick in picks), abs=1e-12)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(CHOICES, min_size=1, max_size=5), st.integers(0, 160), st.booleans())
def test_finds_the_least_harm(
    tables: list[list[tuple[int, float]]], max_bytes: int, is_paired: bool
) -> None:
    options = options_of(tables)
    together = [("site0", "site1")] if is_paired and len(tables) > 1 else []
    allowed = [
        (harm, nbytes) for nbytes, harm in assignments(options, together) if nbytes <= max_bytes
    ]
    if not allowed:
        with pytest.raises(PassError, match="the smallest choices take"):
            least_harm(options, max_bytes=max_bytes, together=together)
        return
    mix = least_harm(options, max_bytes=max_bytes, together=together)
    check(mix, options)
    assert mix.nbytes <= max_bytes
    assert mix.harm == mix.bound == min(allowed)[0]
    assert all(mix.choices[site] == mix.choices["site0"] for group in together for site in group)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(CHOICES, min_size=1, max_size=5), st.integers(-16, 200))
def test_finds_the_fewest_bytes(tables: list[list[tuple[int, float]]], eighths: int) -> None:
    options, max_harm = options_of(tables), eighths / 8
    allowed = [pair for pair in assignments(options) if pair[1] <= max_harm]
    if not allowed:
        with pytest.raises(PassError, match="the gentlest choices do a harm of"):
            least_bytes(options, max_harm=max_harm)
        return
    mix = least_bytes(options, max_harm=max_harm)
    check(mix, options)
    assert mix.harm <= max_harm
    assert mix.nbytes == mix.bound == min(allowed)[0]


def model(num_layers: int) -> Options:
    """Linear maps as a decoder has them, with harms that differ by thousands."""
    rng = random.Random(0)
    numbers = {"qkv": 1600 * 960, "out": 960 * 960, "up": 2560 * 960, "down": 960 * 2560}
    options = {}
    for layer, (name, count) in itertools.product(range(num_layers), numbers.items()):
        size = rng.lognormvariate(0, 1.5) * count
        options[f"{layer}.{name}"] = [
            Choice(
                name=f"int{bits}",
                nbytes=count * bits // 8 + rng.randrange(50_000),
                harm=0.0 if bits == 32 else size * 4.0**-bits * rng.uniform(0.5, 2.0),
            )
            for bits in (3, 4, 6, 8, 32)
        ]
    return options


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
def test_a_large_model_is_solved_exactly(share: float) -> None:
    options = model(24)
    least = sum(min(choice.nbytes for choice in choices) for choices in options.values())
    most = sum(max(choice.nbytes for choice in choices) for choices in options.values())
    max_bytes = round(least + share * (most - least))
    mix = least_harm(options, max_bytes=max_bytes)
    check(mix, options)
    assert mix.nbytes <= max_bytes
    assert mix.bound == pytest.approx(mix.harm, rel=1e-9)
    # Turned round: no fewer bytes do with this harm. The sums differ in their last bits.
    assert least_bytes(options, max_harm=mix.harm * (1 + 1e-9)).nbytes == mix.nbytes
    assert least_harm(options, max_bytes=max_bytes) == mix


def test_a_thinned_search_says_how_far_off_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    options = model(6)
    max_bytes = 40_000_000
    exact = least_harm(options, max_bytes=max_bytes)
    monkeypatch.setattr("edgevlm.quant.mixed.MAX_STATES", 2)
    thinned = least_harm(options, max_bytes=max_bytes)
    check(thinned, options)
    assert thinned.bound < exact.bound == pytest.approx(exact.harm)
    assert thinned.bound <= exact.harm <= thinned.harm <= 1.1 * exact.harm


def test_sites_that_choose_alike_do() -> None:
    names = [["a", "b"], ["b", "a"], ["b", "c"]]
    options = {
        f"site{index}": [Choice(name=n, nbytes=ord(n), harm=-ord(n)) for n in row]
        for index, row in enumerate(names)
    }
    mix = least_harm(options, max_bytes=10_000, together=[("site0", "site1")])
    assert mix.choices == {"site0": "b", "site1": "b", "site2": "c"}
    options["site2"] = options["site2"][1:]
    with pytest.raises(PassError) as error:
        least_harm(options, max_bytes=10_000, together=[("site0", "site2")])
    assert str(error.value) == (
        "quantize at site0: no choice is open to all of site0, site2\n"
        "  hint: give sites that choose alike the same choices"
    )


def test_budgets_that_cannot_be_met() -> None:
    options = options_of([[(1000, 0.5), (3000, 0.25)], [(500, 1.0)]])
    with pytest.raises(PassError) as error:
        least_harm(options, max_bytes=1499)
    assert str(error.value) == (
        "quantize: the smallest choices take 1,500 bytes, 1,499 are allowed\n"
        "  hint: raise max_bytes, or allow fewer bits"
    )
    with pytest.raises(PassError) as error:
        least_bytes(options, max_harm=1.2)
    assert str(error.value) == (
        "quantize: the gentlest choices do a harm of 1.25, 1.2 is allowed\n"
        "  hint: raise the accuracy that may be lost, or allow more bits"
    )


def test_no_sites_need_no_bytes() -> None:
    assert least_harm({}, max_bytes=0) == Mix(choices={}, nbytes=0, harm=0.0, bound=0.0)
