"""Wishes for tests, settled for the host."""

from __future__ import annotations

from typing import Any

from edgevlm.decisions import Decision
from edgevlm.device import Device, load_device
from edgevlm.model.spec import VlmSpec
from edgevlm.quant.assign import Assignment, Wishes, assign
from edgevlm.quant.options import SchemeOptions, SiteOptions
from tests.edgevlm.tiny import tiny_spec

HOST = load_device("host-cpu")
ORT, STATIC, BOTH = ("ort",), ("static",), ("ort", "static")


def wish(scheme: Any, **more: Any) -> SchemeOptions:
    return SchemeOptions.model_validate({"scheme": scheme, **more})


def assigned(
    targets: tuple[str, ...] = ORT,
    *rules: SiteOptions,
    spec: VlmSpec | None = None,
    device: Device = HOST,
    prefill: SchemeOptions | None = None,
    **components: SchemeOptions,
) -> Assignment:
    wishes = Wishes(components=components, prefill=prefill, rules=rules)
    return assign(wishes, spec or tiny_spec(), device, targets)


def said(assignment: Assignment) -> list[Decision]:
    """The decisions but those about opsets."""
    return [item for item in assignment.decisions if not item.asked.startswith("opset")]
