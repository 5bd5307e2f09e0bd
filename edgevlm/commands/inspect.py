"""`edgevlm inspect`: what a bundle holds, every hash checked, and the evidence for it."""

from __future__ import annotations

from pathlib import Path

from edgevlm.commands.audit import audit_document, audits_of, show_audits
from edgevlm.commands.bundle import bundle_document, show_bundle
from edgevlm.commands.output import console, print_json
from edgevlm_runtime.bundle import Bundle


def inspect_command(path: Path, *, audit: bool, as_json: bool) -> None:
    """Open a bundle and show it, or its audit."""
    bundle = Bundle.open(path)
    bundle.check()
    if audit:
        audits = audits_of(bundle.manifest.provenance)
        if as_json:
            print_json(audit_document(audits))
        else:
            show_audits(audits, console())
    elif as_json:
        print_json(bundle_document(bundle))
    else:
        show_bundle(bundle, console())
