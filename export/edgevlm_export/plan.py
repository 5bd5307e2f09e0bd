"""What a graph takes and gives, as data: enough to capture it, to write it and to feed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from edgevlm_runtime.manifest import TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """The flat inputs and outputs of one graph, in the order of its module's `forward`.

    A dimension that is a name is dynamic; equal names are one dimension. `defaults` holds the value
    of inputs that may stay unbound (`logit_rows`: [-1], the last row). `examples` are sizes of
    dynamic dimensions to trace with, for a module that does not take any small numbers.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    defaults: Mapping[str, np.ndarray] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)

    def fixed(self, **sizes: int) -> GraphPlan:
        """The same plan with numbers in place of these dynamic dimensions."""

        def fix(spec: TensorSpec) -> TensorSpec:
            shape = tuple(sizes.get(d, d) if isinstance(d, str) else d for d in spec.shape)
            return replace(spec, shape=shape)

        return replace(
            self,
            inputs=tuple(fix(spec) for spec in self.inputs),
            outputs=tuple(fix(spec) for spec in self.outputs),
        )
