"""The batched Muon against `torch.optim.Muon`."""

from __future__ import annotations

import pytest
import torch

from edgevlm.scenes.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(48, 128), (128, 48), (64, 64)])
def test_moves_as_torch_does(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        torch.optim.Muon(
            [theirs],
            lr=1e-2,
            weight_decay=0.01,
            momentum=0.95,
            ns_steps=5,
            adjust_lr_fn="match_rms_adamw",
        ),
        Muon([{"params": [ours], "lr": 1e-2}]),
    )
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((theirs, ours), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    # PyTorch iterates in bfloat16, of 8 bits: about 1 % of the way moved.
    far = (theirs - ours).detach().norm() / (theirs.detach() - start).norm()
    assert far < 0.03


def test_matrices_of_a_stack_do_not_see_each_other() -> None:
    stack = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in stack])
    # The same products in another order of summation, or in bfloat16 where that is fast.
    torch.testing.assert_close(orthogonalize(stack), alone, atol=1e-2, rtol=0)


def test_singular_values_come_near_one() -> None:
    # Newton-Schulz with this quintic takes every singular value into 0.7 to 1.2, by design.
    matrix = torch.randn(1, 32, 96, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.65
    assert values.max() < 1.25
