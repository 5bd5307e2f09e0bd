"""Better scales and integers for a matrix that is quantized already, under its inputs' moments.

Each of these leaves every output channel at most as wrong as it was, by d H d^T (see `gptq`), and
keeps the sign of every scale. What a search over the weights alone, GPTQ or AWQ gives can be passed
on to any of them, and from one to the next.
"""

# N outputs, K inputs, G groups of W columns, C columns of a block

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from edgevlm.quant.affine import QuantTensor, group_spans, integer_range, quantize
from edgevlm.quant.gptq import Hessian, output_errors, rows_of

# Clipped shares of a group's scale; AWQ goes down to half.
CLIP_RATIOS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
# Numbers of a stack of normal equations that are held at once.
CHUNK = 1 << 22
# Share of the mean of the diagonal that holds scales near what they are where inputs say nothing.
RIDGE = 1e-3


def clip_search(weight: Tensor, tensor: QuantTensor, hessian: Hessian) -> QuantTensor:
    """Shrink scales where a group's outputs, as far as its own columns go, get closer by it.

    The search of AWQ (Lin et al., 2024), which looks at every group by itself.
    """
    mean_KK = hessian.mean()
    scale_NG = tensor.scale.clone()
    least_NG = _group_errors(weight, tensor, mean_KK)
    for ratio in CLIP_RATIOS:
        tried = _requantized(weight, tensor, tensor.scale * ratio)
        errors_NG = _group_errors(weight, tried, mean_KK)
        is_better_NG = errors_NG < least_NG
        least_NG = torch.where(is_better_NG, errors_NG, least_NG)
        scale_NG = torch.where(is_better_NG, tried.scale, scale_NG)
    return _better_rows(weight, tensor, _requantized(weight, tensor, scale_NG), mean_KK)


def scale_estimation(
    weight: Tensor, tensor: QuantTensor, hessian: Hessian, *, rounds: int = 5
) -> QuantTensor:
    """Fit each scale to its group's integers by least squares, round again, and so on.

    Columns count as much as the mean square of their inputs, as if these were independent. Weights
    are rounded to nearest: this undoes what GPTQ did, for which there is `refit_scales`.
    """
    mean_KK = hessian.mean()
    square_K = mean_KK.diagonal()
    best = tensor
    for _ in range(rounds):
        value_NK = tensor.values.float()
        scale_NG = tensor.scale.clone()
        for columns, groups, width in group_spans(weight.shape[1], tensor.group_size):
            value_NGW = value_NK[:, columns].unflatten(1, (-1, width))
            if tensor.zero is not None:
                value_NGW = value_NGW - tensor.zero[:, groups, None]
            weighted_NGW = value_NGW * square_K[columns].unflatten(0, (-1, width))
            part_NGW = weight[:, columns].float().unflatten(1, (-1, width))
            fitted_NG = torch.linalg.vecdot(part_NGW, weighted_NGW)
            fitted_NG /= torch.linalg.vecdot(value_NGW, weighted_NGW)
            scale_NG[:, groups] = _same_sign(fitted_NG, scale_NG[:, groups])
        tensor = _requantized(weight, tensor, scale_NG)
        best = _better_rows(weight, best, tensor, mean_KK)
    return best


def refit_scales(weight: Tensor, tensor: QuantTensor, hessian: Hessian) -> QuantTensor:
    """Give every row the scales that fit its integers best, all groups together.

    d H d^T is quadratic in the scales of a row: with v the integers less their zeros, the normal
    equations are sum over h of (v_g H_gh v_h) s_h = v_g H_g w. Integers stay as they are.
    """
    mean_KK = hessian.mean()
    num_groups = tensor.scale.shape[1]
    width = tensor.group_size or weight.shape[1]
    # A short last group is filled up with columns that no row reads.
    missing = num_groups * width - weight.shape[1]
    padded_KK = pad(mean_KK, (0, missing, 0, missing))
    scale_NG = tensor.scale.clone()
    step = max(1, CHUNK // max(weight.shape[1], num_groups**2))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        value_NGW = pad(tensor.values[rows].float(), (0, missing)).unflatten(1, (-1, width))
        if tensor.zero is not None:
            value_NGW -= tensor.zero[rows, :, None]
            value_NGW.flatten(1)[:, weight.shape[1] :] = 0.0
        value_NK = value_NGW.flatten(1)
        target_NK = pad(weight[rows].float() @ mean_KK, (0, missing))
        right_NG = (value_NK * target_NK).unflatten(1, (-1, width)).sum(dim=2)
        left_NGG = right_NG.new_zeros(len(right_NG), num_groups, num_groups)
        for group in range(num_groups):
            span, later = slice(group * width, (group + 1) * width), slice(group * width, None)
            product_NK = (value_NK[:, span] @ padded_KK[span, later]).mul_(value_NK[:, later])
            part_NG = product_NK.unflatten(1, (-1, width)).sum(dim=2)
            left_NGG[:, group, group:] = part_NG
            left_NGG[:, group:, group] = part_NG
        scale_NG[rows] = _solved(left_NGG.double(), right_NG.double(), scale_NG[rows])
    return _better_rows(weight, tensor, replace(tensor, scale=scale_NG), mean_KK)


def descend(
    weight: Tensor, tensor: QuantTensor, hessian: Hessian, *, rounds: int = 1, block: int = 64
) -> QuantTensor:
    """Round every column anew with all others as they are, `rounds` times through all of them.

    Coordinate descent (QuantEase, Behdin et al., 2023): no move makes d H d^T larger. Where GPTQ
    can only look at the columns after, this goes over them in the light of all.
    """
    mean_KK = hessian.mean()
    low, high = integer_range(tensor.bits)
    weight_KN = weight.float().T.contiguous()
    group_K = torch.arange(len(weight_KN)) // (tensor.group_size or len(weight_KN))
    scale_GN = tensor.scale.T.contiguous()
    zero_GN = torch.zeros_like(scale_GN) if tensor.zero is None else tensor.zero.T.float()
    value_KN = tensor.values.T.float().contiguous()
    error_KN = weight_KN - tensor.dequantize().T
    square = mean_KK.diagonal().tolist()
    groups = group_K.tolist()
    for _ in range(rounds):
        slope_KN = mean_KK @ error_KN
        for start in range(0, len(weight_KN), block):
            stop = min(start + block, len(weight_KN))
            moves_CN = torch.zeros_like(weight_KN[start:stop])
            for column in range(start, stop):
                if square[column] <= 0.0:
                    continue
                scale_N, zero_N = scale_GN[groups[column]], zero_GN[groups[column]]
                best_N = weight_KN[column] - error_KN[column]
                best_N.add_(slope_KN[column], alpha=1 / square[column])
                value_KN[column] = best_N.div_(scale_N).round_().add_(zero_N).clamp_(low, high)
                error_N = weight_KN[column] - (value_KN[column] - zero_N) * scale_N
                move_N = torch.sub(error_N, error_KN[column], out=moves_CN[column - start])
                error_KN[column] = error_N
                slope_KN[start:stop].addcmul_(mean_KK[start:stop, column, None], move_N[None])
            slope_KN[:start].addmm_(mean_KK[:start, start:stop], moves_CN)
            slope_KN[stop:].addmm_(mean_KK[stop:, start:stop], moves_CN)
    moved = replace(tensor, values=value_KN.T.contiguous().to(tensor.values.dtype))
    return _better_rows(weight, tensor, moved, mean_KK)


def _requantized(weight: Tensor, tensor: QuantTensor, scale_NG: Tensor) -> QuantTensor:
    """Weights rounded to nearest with other scales."""
    return quantize(weight, scale_NG, tensor.zero, bits=tensor.bits, group_size=tensor.group_size)


def _better_rows(
    weight: Tensor, before: QuantTensor, after: QuantTensor, mean_KK: Tensor
) -> QuantTensor:
    """The rows of `after` where their outputs are closer, else those of `before`."""
    is_better_N = output_errors(weight, after, mean_KK) < output_errors(weight, before, mean_KK)
    return rows_of(is_better_N, after, before)


def _group_errors(weight: Tensor, tensor: QuantTensor, mean_KK: Tensor) -> Tensor:
    """d_g H_gg d_g^T for every row and group [N, G]: a group's error with all others exact."""
    d_NK = weight.float() - tensor.dequantize()
    errors = []
    for columns, _, width in group_spans(weight.shape[1], tensor.group_size):
        d_GNW = d_NK[:, columns].unflatten(1, (-1, width)).transpose(0, 1)
        block_KK = mean_KK[columns, columns].unflatten(0, (-1, width)).unflatten(2, (-1, width))
        block_GWW = block_KK.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        errors.append(torch.linalg.vecdot(d_GNW @ block_GWW, d_GNW).T)
    return torch.cat(errors, dim=1)


def _solved(left_NGG: Tensor, right_NG: Tensor, scale_NG: Tensor) -> Tensor:
    """Scales [N, G] that solve the normal equations, held near the given ones by a small ridge."""
    diagonal_NG = left_NGG.diagonal(dim1=1, dim2=2)
    ridge_N1 = RIDGE * diagonal_NG.mean(dim=1, keepdim=True)
    # A row of zeros only has nothing to solve for.
    ridge_N1 = torch.where(ridge_N1 > 0, ridge_N1, 1.0)
    right_NG = right_NG + ridge_N1 * scale_NG
    diagonal_NG += ridge_N1
    solved_NG: Tensor = torch.linalg.solve(left_NGG, right_NG)
    return _same_sign(solved_NG.float(), scale_NG)


def _same_sign(scale: Tensor, before: Tensor) -> Tensor:
    """The scale where it is finite and has the sign that it had, else what it was."""
    return torch.where((scale * before > 0) & torch.isfinite(scale), scale, before)
