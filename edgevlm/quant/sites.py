"""The linear maps of a model by their sites, from its spec alone: what a scheme is given to."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.model.spec import LayerSpec, VlmSpec

__all__ = ["COMPONENTS", "LinearSite", "linear_sites"]

COMPONENTS = ("vision", "projector", "decoder", "head")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSite:
    """A linear map: weights [rows, columns], and the component that it belongs to.

    `reader` is what the map reads: maps of one reader see the same input.
    """

    component: str
    rows: int
    columns: int
    reader: str

    @property
    def numbers(self) -> int:
        """Numbers of the weights."""
        return self.rows * self.columns


def linear_sites(spec: VlmSpec) -> dict[str, LinearSite]:
    """Every linear map of a model, in the order in which the model computes them."""
    vision, projector, decoder = spec.vision, spec.projector, spec.decoder
    sites: dict[str, LinearSite] = {}

    def add(site: str, component: str, rows: int, columns: int, reader: str = "") -> None:
        sites[site] = LinearSite(
            component=component, rows=rows, columns=columns, reader=reader or site
        )

    def add_layer(site: str, component: str, width: int, layer: LayerSpec) -> None:
        attention, mlp = layer.attention, layer.mlp
        packed = attention.q_width + 2 * attention.kv_width
        add(f"{site}.attention.qkv", component, packed, width)
        add(f"{site}.attention.out", component, width, attention.q_width)
        names = ("gate", "up") if mlp.gated else ("up",)
        for name in names:
            add(f"{site}.mlp.{name}", component, mlp.width, width, f"{site}.mlp")
        add(f"{site}.mlp.down", component, width, mlp.width)

    if vision.pixels == "patches":
        add("vision.embed.patch", "vision", vision.width, vision.patch_width)
    for index, layer in enumerate(vision.layers):
        add_layer(f"vision.layers.{index}", "vision", vision.width, layer)
    square = projector.in_width * projector.merge**2
    if projector.hidden_width:
        add("projector.up", "projector", projector.hidden_width, square)
        add("projector.down", "projector", projector.out_width, projector.hidden_width)
    else:
        add("projector.linear", "projector", projector.out_width, square)
    for index, layer in enumerate(decoder.layers):
        add_layer(f"decoder.layers.{index}", "decoder", decoder.width, layer)
    add("decoder.head", "head", decoder.vocab_size, decoder.width)
    return sites
