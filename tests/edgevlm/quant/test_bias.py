"""Bias correction: outputs keep their mean."""

from __future__ import annotations

import numpy as np

from edgevlm.quant.bias import bias_correction
from edgevlm.quant.rtn import rtn
from tests.edgevlm.quant import slow


def test_outputs_keep_their_mean() -> None:
    weight, x = slow.drawn_weight(16, 48), slow.drawn_inputs(200, 48) + 3.0
    effective = rtn(weight, bits=3, group_size=0, symmetric=True).dequantize()
    shift = bias_correction(weight, effective, x.mean(dim=0))
    before = (slow.float64(x) @ slow.float64(weight).T).mean(axis=0)
    after = (slow.float64(x) @ slow.float64(effective).T).mean(axis=0)
    assert np.abs(after - before).max() > 1.0
    # The mean of the inputs and the result are float32.
    np.testing.assert_allclose(after + slow.float64(shift), before, atol=1e-4)
