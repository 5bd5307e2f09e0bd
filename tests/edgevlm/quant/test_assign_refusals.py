"""Schemes that no kernel computes: refused, with what would work."""

from __future__ import annotations

from typing import Any

import pytest

from edgevlm.decisions import Decision
from edgevlm.device import load_device, parse_device
from edgevlm.resources import device_files
from tests.edgevlm.quant.assigning import BOTH, ORT, STATIC, assigned, said, wish

KNOWN_ORT = "it multiplies int4 x float32, int4 x int8, int8 x float32, int8 x int8"
THOR = "it multiplies float8_e4m3fn x float8_e4m3fn, int4 x float32, int8 x int8"
GROUPS = "host-cpu has kernels for groups of 16, 32, 64, 128, 256"
SET_GROUPS = "set group_size or per_channel accordingly"


@pytest.mark.parametrize(
    ("asked", "targets", "expected"),
    [
        (
            {"scheme": "w4a16", "group_size": 48},
            ORT,
            ("quantize decoder w4a16 in groups of 48 on 'ort'", GROUPS, SET_GROUPS),
        ),
        (
            {"scheme": "w4a16", "group_size": 256},
            STATIC,
            (
                "quantize decoder w4a16 in groups of 256 on 'static'",
                "host-cpu has kernels for whole channels and groups of 16, 32, 64, 128",
                SET_GROUPS,
            ),
        ),
        (
            {"scheme": "w4a16", "per_channel": True},
            ORT,
            ("quantize decoder w4a16 in whole channels on 'ort'", GROUPS, SET_GROUPS),
        ),
        (
            {"scheme": "w4a8"},
            BOTH,
            (
                "quantize decoder w4a8 in groups of 32 on 'ort'",
                "host-cpu has kernels for whole channels",
                SET_GROUPS,
            ),
        ),
        (
            {"scheme": "w16a16"},
            ORT,
            (
                "quantize decoder w16a16 on 'ort'",
                "host-cpu multiplies no int16 by float32 there",
                KNOWN_ORT,
            ),
        ),
        (
            {"scheme": "fp8"},
            ORT,
            (
                "quantize decoder fp8 on 'ort'",
                "host-cpu multiplies no float8_e4m3fn by float8_e4m3fn there",
                KNOWN_ORT,
            ),
        ),
        (
            {"scheme": "w8a8", "activations": "token"},
            STATIC,
            (
                "quantize decoder w8a8 with activations: token on 'static'",
                "host-cpu has kernels for activations: static",
                "set activations accordingly",
            ),
        ),
        (
            {"scheme": "w8a8", "activations": "tensor"},
            ORT,
            (
                "quantize decoder w8a8 with activations: tensor",
                "a row would change with the rows beside it, and a prompt with how it is cut",
                "choose activations: token, or static",
            ),
        ),
    ],
)
def test_what_no_kernel_does_is_refused(
    asked: dict[str, Any], targets: tuple[str, ...], expected: tuple[str, str, str]
) -> None:
    """One refusal for the whole part, from the device's file alone."""
    (found,) = said(assigned(targets, decoder=wish(**asked)))
    assert found == Decision(
        asked=expected[0], outcome="refused", reason=expected[1], effect=expected[2]
    )


@pytest.mark.parametrize(
    ("asked", "reason", "effect"),
    [
        (
            {"scheme": "w8a8", "symmetric": False},
            "its scales have no zero points",
            "remove symmetric: false",
        ),
        (
            {"scheme": "w4a16", "group_size": 32},
            "jetson-thor has kernels for groups of 64, 128",
            SET_GROUPS,
        ),
        ({"scheme": "w8a16"}, "jetson-thor multiplies no int8 by float32 there", THOR),
        ({"scheme": "w4a8"}, "jetson-thor multiplies no int4 by int8 there", THOR),
    ],
)
def test_what_tensorrt_has_not_is_refused(asked: dict[str, Any], reason: str, effect: str) -> None:
    thor = load_device("jetson-thor")
    (found,) = said(assigned(("tensorrt",), decoder=wish(**asked), device=thor))
    assert (found.outcome, found.reason, found.effect) == ("refused", reason, effect)


def test_the_encoder_may_have_one_scale_for_a_picture() -> None:
    (found,) = said(assigned(vision=wish("w8a8", activations="tensor")))
    assert found.outcome == "degraded"
    assert "7-bit tensor" in found.effect


@pytest.mark.parametrize(
    ("newest", "expected"),
    [
        (
            26,
            Decision(
                asked="opset 19 of target 'static'",
                outcome="degraded",
                reason="int16, int4 and groups need opset 21",
                effect="graphs are opset 21",
            ),
        ),
        (
            20,
            Decision(
                asked="opset 19 of target 'static'",
                outcome="refused",
                reason="int16, int4 and groups need opset 21, host-cpu loads opset 20 at most",
                effect="choose w8a8 or fp8 per channel",
            ),
        ),
    ],
)
def test_a_newer_opset_is_told(newest: int, expected: Decision) -> None:
    path = device_files()["host-cpu"]
    old = path.read_text().replace("opset_max: {value: 26", f"opset_max: {{value: {newest}")
    device = parse_device(old, path)
    for scheme in ("w8a16", "w4a16", "w16a16"):
        found = assigned(STATIC, decoder=wish(scheme), device=device).decisions
        assert [item for item in found if item.asked.startswith("opset")] == [expected]
    for scheme in ("w8a8", "fp8"):
        found = assigned(STATIC, decoder=wish(scheme), device=device).decisions
        assert [item.outcome for item in found] == ["applied"]
