"""`edgevlm devices`: the devices there are, or the facts of one with their sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgevlm.commands.output import console, print_json, table
from edgevlm.device import Device, list_devices, load_device


def devices_command(name: str | None, *, as_json: bool) -> None:
    """List all devices, or show one."""
    if name is None:
        devices = list_devices()
        if as_json:
            print_json({"devices": [device.model_dump(mode="json") for device in devices]})
        else:
            _show_all(devices)
        return
    device = load_device(name)
    if as_json:
        print_json({"devices": [device.model_dump(mode="json")]})
    else:
        _show(device)


def _show_all(devices: list[Device]) -> None:
    shown = table(None, "device", "what it is", "targets", "memory", "verified")
    for device in devices:
        capacity = device.memory.capacity
        shown.add_row(
            device.name,
            device.summary,
            ", ".join(device.targets),
            f"{capacity.value:g} {capacity.unit}",
            device.verified_on,
        )
    console().print(shown)


def _show(device: Device) -> None:
    out = console()
    out.print(f"{device.name}  {device.summary}", style="bold")
    out.print(f"{device.soc}; {device.stack.name} {device.stack.version}; {device.compile.route}")
    out.print()
    facts = table("facts", "what", "value", "known by", "source")
    data = device.model_dump(mode="json")
    for name, fact in _facts(data, ""):
        facts.add_row(name, _value(fact), fact["kind"], fact["source"])
    out.print(facts)
    out.print()
    sources = table("sources", "name", "what it is")
    for name, text in device.sources.items():
        sources.add_row(name, text)
    out.print(sources)


def _facts(data: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Everything that carries a source, by its path in the file."""
    if isinstance(data, Mapping):
        if "source" in data:
            yield name, data
            return
        for key, value in data.items():
            yield from _facts(value, f"{name}.{key}" if name else key)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _facts(value, f"{name}.{index}")


def _value(fact: Mapping[str, Any]) -> str:
    if "value" in fact:
        number = f"{fact['value']:g} {fact.get('unit', '')}".strip()
        return f"{number} ({fact['note']})" if fact["note"] else number
    left_out = ("kind", "source")
    parts = [
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in fact.items()
        if key not in left_out and value not in (None, [])
    ]
    return ", ".join(parts)
