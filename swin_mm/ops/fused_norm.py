"""Residual addition, LayerNorm and the cast after it in one pass, as Triton kernels with a backward pass.

Two forms, with the stochastic depth factor ``keep`` of each image:

* :func:`add_norm` for V1, which normalises before each branch: ``total = x + keep * branch``, ``LayerNorm(total)``;
* :func:`norm_add` for V2, which normalises after it: ``total = x + keep * LayerNorm(branch)``, and a copy of it.

PyTorch takes a pass for each of the addition, the norm and, under autocast, the cast of its result, and more of them in
the backward pass. In units of one map in 16 bits, with the residual stream in float32, that is 12 forward and 18
backward; these kernels move 6 and 8.

Gradients of weight and bias are sums over rows. Each program writes the sum over its rows, and a second pass adds these
in a fixed order: there are no atomics, and runs repeat exactly.

M rows (tokens of all images), T rows per image, C channels.
"""

from __future__ import annotations  # annotations use Triton's types, which may not exist

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from swin_mm.ops import verification
from swin_mm.ops.attention.triton import launch, operators_are_seen, version_problem
from swin_mm.utils.compat import custom_op

try:
    import triton
    import triton.language as tl
except Exception:  # not on every platform, or broken: see `unsupported_reason`
    triton = None

PROGRAMS = 512  # of the backward pass; each writes a partial sum
TILE = 2048  # elements that a program holds of each tensor
MAX_CHANNELS = 4096
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _jit(function):
    """``triton.jit`` for a kernel or a part of one, compiled once for all sizes of maps and batches."""
    if triton is None:
        return function
    varying = ('rows', 'image_rows', 'programs', 'H', 'W', 'down', 'across')
    return triton.jit(function, do_not_specialize=[n for n in varying if n in function.__code__.co_varnames])


@_jit
def _tile(block, rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row indices of a tile, its offsets in a tensor of (rows, C), and which of its elements exist."""
    i = block * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    return i, i.to(tl.int64)[:, None] * C + j[None, :], (i < rows)[:, None] & (j < C)[None, :]


@_jit
def _transposed(i, image_rows, C: tl.constexpr, COLUMNS: tl.constexpr):
    """The offsets of a tile, transposed, in a tensor of (images, C, image_rows)."""
    first = (i // image_rows).to(tl.int64) * image_rows * C + i % image_rows
    return first[None, :] + tl.arange(0, COLUMNS).to(tl.int64)[:, None] * image_rows


@_jit
def _load_vector(vector, C: tl.constexpr, COLUMNS: tl.constexpr):
    j = tl.arange(0, COLUMNS)
    return tl.load(vector + j, mask=j < C, other=0.0).to(tl.float32)[None, :]


@_jit
def _load_keep(keep, i, rows, image_rows):
    """The factor of each row."""
    return tl.load(keep + i // image_rows, mask=i < rows, other=0.0).to(tl.float32)[:, None]


@_jit
def _normalise(values, exists, eps, C: tl.constexpr):
    """Mean and inverse standard deviation of each row, and the rows normalised; ``values`` are 0 beyond C."""
    mean = tl.sum(values, 1) / C
    centred = tl.where(exists, values - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    return mean, rstd, centred * rstd[:, None]


@_jit
def _restore(values, mean, rstd, i, rows, exists):
    """Inverse standard deviation of each row, and the rows normalised, from what the forward saved."""
    row_rstd = tl.load(rstd + i, mask=i < rows, other=0.0)
    centred = tl.where(exists, values - tl.load(mean + i, mask=i < rows, other=0.0)[:, None], 0.0)
    return row_rstd, centred * row_rstd[:, None]


@_jit
def _normalise_backward(grad, unit, rstd, C: tl.constexpr):
    """Gradient of rows, given that of the rows normalised; both are 0 beyond C."""
    along = tl.sum(grad * unit, 1) / C
    mean = tl.sum(grad, 1) / C
    return (grad - mean[:, None] - unit * along[:, None]) * rstd[:, None]


@_jit
def _store_sums(to, sum_weight, sum_bias, gap, C: tl.constexpr, COLUMNS: tl.constexpr):
    """C elements of a program's part of the gradient of the weight, and those of the bias ``gap`` behind."""
    j = tl.arange(0, COLUMNS)
    tl.store(to + j, sum_weight, mask=j < C)
    tl.store(to + gap + j, sum_bias, mask=j < C)


@_jit
def _add_norm(
    x, branch, keep, weight, bias, total, out, mean, rstd,
    eps, rows, image_rows,
    BRANCH: tl.constexpr, KEEP: tl.constexpr, SAVE: tl.constexpr, NCHW: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``total = x + keep * branch`` if BRANCH, and the norm of it, with channels before rows if NCHW."""
    i, at, exists = _tile(tl.program_id(0), rows, C, ROWS, COLUMNS)
    values = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    if BRANCH:
        added = tl.load(branch + at, mask=exists, other=0.0).to(tl.float32)
        if KEEP:
            added *= _load_keep(keep, i, rows, image_rows)
        rounded = (values + added).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=exists)
        values = rounded.to(tl.float32)
    row_mean, row_rstd, unit = _normalise(values, exists, eps, C)
    result = unit * _load_vector(weight, C, COLUMNS) + _load_vector(bias, C, COLUMNS)
    if NCHW:
        to = _transposed(i, image_rows, C, COLUMNS)
        tl.store(out + to, tl.trans(result).to(out.dtype.element_ty), mask=tl.trans(exists))
    else:
        tl.store(out + at, result.to(out.dtype.element_ty), mask=exists)
    if SAVE:
        tl.store(mean + i, row_mean, mask=i < rows)
        tl.store(rstd + i, row_rstd, mask=i < rows)


@_jit
def _corners(i, H, W, down, across):
    """For each row of a merged map, its place (y, x) in the map, and the row of the token there."""
    y, x = i // across % down * 2, i % across * 2
    return y, x, (i // across // down * H + y).to(tl.int64) * W + x


@_jit
def _load_neighbour(x, corners, n: tl.constexpr, channels, H, W, C: tl.constexpr, COLUMNS: tl.constexpr):
    """The n-th of 2 x 2 neighbours, column by column: its values, 0 beyond the map; its offsets; what is in the map."""
    top, left, row = corners
    inside = channels & ((top + n % 2 < H) & (left + n // 2 < W))[:, None]
    at = (row + n % 2 * W + n // 2)[:, None] * C + tl.arange(0, COLUMNS)[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32), at, inside


@_jit
def _merge_norm(
    x, weight, bias, out, mean, rstd,
    eps, rows, H, W, down, across,
    SAVE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The norm of the channels of 2 x 2 neighbours, which are read three times, but from the cache."""
    i, _, channels = _tile(tl.program_id(0), rows, C, ROWS, COLUMNS)
    corners = _corners(i, H, W, down, across)
    total = tl.zeros([ROWS], tl.float32)
    for n in tl.static_range(4):
        values, _, _ = _load_neighbour(x, corners, n, channels, H, W, C, COLUMNS)
        total += tl.sum(values, 1)
    row_mean = total / (4 * C)
    squares = tl.zeros([ROWS], tl.float32)
    for n in tl.static_range(4):
        values, _, _ = _load_neighbour(x, corners, n, channels, H, W, C, COLUMNS)
        centred = tl.where(channels, values - row_mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    row_rstd = 1 / tl.sqrt(squares / (4 * C) + eps)
    to = i.to(tl.int64)[:, None] * (4 * C) + tl.arange(0, COLUMNS)[None, :]
    for n in tl.static_range(4):
        values, _, _ = _load_neighbour(x, corners, n, channels, H, W, C, COLUMNS)
        unit = (values - row_mean[:, None]) * row_rstd[:, None]
        result = unit * _load_vector(weight + n * C, C, COLUMNS) + _load_vector(bias + n * C, C, COLUMNS)
        tl.store(out + to + n * C, result.to(out.dtype.element_ty), mask=channels)
    if SAVE:
        tl.store(mean + i, row_mean, mask=i < rows)
        tl.store(rstd + i, row_rstd, mask=i < rows)


@_jit
def _merge_norm_backward(
    grad_out, x, mean, rstd, weight, grad_x, parts,
    rows, H, W, down, across, programs,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and partial sums, (2, 4 * C)."""
    sums = tl.zeros([COLUMNS], tl.float32)
    sum_0, sum_1, sum_2, sum_3 = sums, sums, sums, sums
    bias_0, bias_1, bias_2, bias_3 = sums, sums, sums, sums
    for block in range(tl.program_id(0), (rows + ROWS - 1) // ROWS, programs):
        i, _, channels = _tile(block, rows, C, ROWS, COLUMNS)
        corners = _corners(i, H, W, down, across)
        row_mean = tl.load(mean + i, mask=i < rows, other=0.0)[:, None]
        row_rstd = tl.load(rstd + i, mask=i < rows, other=0.0)[:, None]
        grads = grad_out + i.to(tl.int64)[:, None] * (4 * C) + tl.arange(0, COLUMNS)[None, :]
        along = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for n in tl.static_range(4):
            values, _, _ = _load_neighbour(x, corners, n, channels, H, W, C, COLUMNS)
            g = tl.load(grads + n * C, mask=channels, other=0.0).to(tl.float32)
            weighted = g * _load_vector(weight + n * C, C, COLUMNS)
            along += tl.sum(weighted * (values - row_mean) * row_rstd, 1)
            total += tl.sum(weighted, 1)
        along, total = along / (4 * C), total / (4 * C)
        for n in tl.static_range(4):
            values, at, inside = _load_neighbour(x, corners, n, channels, H, W, C, COLUMNS)
            g = tl.load(grads + n * C, mask=channels, other=0.0).to(tl.float32)
            weighted = g * _load_vector(weight + n * C, C, COLUMNS)
            unit = (values - row_mean) * row_rstd
            grad = (weighted - total[:, None] - unit * along[:, None]) * row_rstd
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
            if n == 0:
                sum_0, bias_0 = sum_0 + tl.sum(g * unit, 0), bias_0 + tl.sum(g, 0)
            elif n == 1:
                sum_1, bias_1 = sum_1 + tl.sum(g * unit, 0), bias_1 + tl.sum(g, 0)
            elif n == 2:
                sum_2, bias_2 = sum_2 + tl.sum(g * unit, 0), bias_2 + tl.sum(g, 0)
            else:
                sum_3, bias_3 = sum_3 + tl.sum(g * unit, 0), bias_3 + tl.sum(g, 0)
    to = parts + tl.program_id(0) * 8 * C
    _store_sums(to, sum_0, bias_0, 4 * C, C, COLUMNS)
    _store_sums(to + C, sum_1, bias_1, 4 * C, C, COLUMNS)
    _store_sums(to + 2 * C, sum_2, bias_2, 4 * C, C, COLUMNS)
    _store_sums(to + 3 * C, sum_3, bias_3, 4 * C, C, COLUMNS)


@_jit
def _add_norm_backward(
    grad_total, grad_out, total, mean, rstd, keep, weight, grad_x, grad_branch, parts,
    rows, image_rows, programs,
    TOTAL: tl.constexpr, BRANCH: tl.constexpr, KEEP: tl.constexpr, NCHW: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of the branch if BRANCH (otherwise it equals that of x), and partial sums."""
    w = _load_vector(weight, C, COLUMNS)
    sum_weight = tl.zeros([COLUMNS], tl.float32)
    sum_bias = tl.zeros([COLUMNS], tl.float32)
    for block in range(tl.program_id(0), (rows + ROWS - 1) // ROWS, programs):
        i, at, exists = _tile(block, rows, C, ROWS, COLUMNS)
        if NCHW:
            to = _transposed(i, image_rows, C, COLUMNS)
            g = tl.trans(tl.load(grad_out + to, mask=tl.trans(exists), other=0.0)).to(tl.float32)
        else:
            g = tl.load(grad_out + at, mask=exists, other=0.0).to(tl.float32)
        values = tl.load(total + at, mask=exists, other=0.0).to(tl.float32)
        row_rstd, unit = _restore(values, mean, rstd, i, rows, exists)
        grad = _normalise_backward(g * w, unit, row_rstd, C)
        if TOTAL:
            grad += tl.load(grad_total + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=exists)
        if BRANCH:
            if KEEP:
                grad *= _load_keep(keep, i, rows, image_rows)
            tl.store(grad_branch + at, grad.to(grad_branch.dtype.element_ty), mask=exists)
        sum_weight += tl.sum(g * unit, 0)
        sum_bias += tl.sum(g, 0)
    _store_sums(parts + tl.program_id(0) * 2 * C, sum_weight, sum_bias, C, C, COLUMNS)


@_jit
def _norm_add(
    x, branch, keep, weight, bias, total, out, mean, rstd,
    eps, rows, image_rows,
    OUT: tl.constexpr, KEEP: tl.constexpr, SAVE: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``total = x + keep * norm(branch)``, and a copy of it in another type if OUT."""
    i, at, exists = _tile(tl.program_id(0), rows, C, ROWS, COLUMNS)
    values = tl.load(branch + at, mask=exists, other=0.0).to(tl.float32)
    row_mean, row_rstd, unit = _normalise(values, exists, eps, C)
    result = unit * _load_vector(weight, C, COLUMNS) + _load_vector(bias, C, COLUMNS)
    if KEEP:
        result *= _load_keep(keep, i, rows, image_rows)
    rounded = (tl.load(x + at, mask=exists, other=0.0).to(tl.float32) + result).to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=exists)
    if OUT:
        tl.store(out + at, rounded.to(tl.float32).to(out.dtype.element_ty), mask=exists)
    if SAVE:
        tl.store(mean + i, row_mean, mask=i < rows)
        tl.store(rstd + i, row_rstd, mask=i < rows)


@_jit
def _norm_add_backward(
    grad_total, grad_out, branch, mean, rstd, keep, weight, grad_x, grad_branch, parts,
    rows, image_rows, programs,
    TOTAL: tl.constexpr, OUT: tl.constexpr, X: tl.constexpr, KEEP: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of x if X (otherwise it equals that of the total), of the branch, and partial sums."""
    w = _load_vector(weight, C, COLUMNS)
    sum_weight = tl.zeros([COLUMNS], tl.float32)
    sum_bias = tl.zeros([COLUMNS], tl.float32)
    for block in range(tl.program_id(0), (rows + ROWS - 1) // ROWS, programs):
        i, at, exists = _tile(block, rows, C, ROWS, COLUMNS)
        g = tl.zeros([ROWS, COLUMNS], tl.float32)
        if TOTAL:
            g += tl.load(grad_total + at, mask=exists, other=0.0).to(tl.float32)
        if OUT:
            g += tl.load(grad_out + at, mask=exists, other=0.0).to(tl.float32)
        if X:
            tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=exists)
        if KEEP:
            g *= _load_keep(keep, i, rows, image_rows)
        values = tl.load(branch + at, mask=exists, other=0.0).to(tl.float32)
        row_rstd, unit = _restore(values, mean, rstd, i, rows, exists)
        grad = _normalise_backward(g * w, unit, row_rstd, C)
        tl.store(grad_branch + at, grad.to(grad_branch.dtype.element_ty), mask=exists)
        sum_weight += tl.sum(g * unit, 0)
        sum_bias += tl.sum(g, 0)
    _store_sums(parts + tl.program_id(0) * 2 * C, sum_weight, sum_bias, C, C, COLUMNS)


def _launch(
    kernel,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple,
    constants: dict[str, Any],
    largest: int = 0,
) -> None:
    """Start a kernel; for tensors that are not there, its constants tell so."""
    if not programs:  # an empty batch
        return
    first = next(t for t in tensors if t is not None)
    ROWS, COLUMNS = _tile_sides(constants['C'], largest)
    warps = 8 if ROWS * COLUMNS > TILE else 4
    arguments = (*(first if t is None else t for t in tensors), *numbers)
    launch(kernel, programs, arguments, {**constants, 'ROWS': ROWS, 'COLUMNS': COLUMNS, 'num_warps': warps})


def _tile_sides(channels: int, largest: int = 0) -> tuple[int, int]:
    """Rows and columns of a tile.

    Args:
        channels: that a tile holds.
        largest: elements that a tile may have in order to get 16 rows, which makes accesses across rows efficient.
    """
    columns = triton.next_power_of_2(channels)
    return max(1, TILE // columns, min(16, largest // columns)), columns


def _blocks(rows: int, channels: int, largest: int = 0) -> int:
    return -(-rows // _tile_sides(channels, largest)[0])


def _empty(like: Tensor, shape: tuple[int, ...] | torch.Size = (0,), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _allocate(x: Tensor, total: torch.dtype | None, out: torch.dtype | None, save: bool) -> tuple[Tensor, ...]:
    """Total, output, mean and inverse standard deviation; empty where not asked for."""
    rows = (x.shape[:-1].numel(),) if save else (0,)
    tensors = (_empty(x) if dtype is None else _empty(x, x.shape, dtype) for dtype in (total, out))
    return *tensors, _empty(x, rows), _empty(x, rows)


def _sizes(x: Tensor) -> tuple[int, int]:
    """Rows, and rows per image."""
    return x.shape[:-1].numel(), x.shape[1:-1].numel()


@custom_op('swin_mm::add_norm')
def _add_norm_op(
    x: Tensor,
    branch: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    save: bool,
    nchw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total (empty without a branch), its norm in ``dtype``, mean and inverse standard deviation (if ``save``)."""
    return _add_norm_forward(x, branch, keep, weight, bias, eps, dtype, save, nchw)


def _add_norm_forward(x, branch, keep, weight, bias, eps, dtype, save, nchw):
    x = x.contiguous()
    total, out, mean, rstd = _add_norm_fake(x, branch, keep, weight, bias, eps, dtype, save, nchw)
    branch = None if branch is None else branch.contiguous()
    C = x.shape[-1]
    rows, image_rows = _sizes(x)
    constants = {'BRANCH': branch is not None, 'KEEP': keep is not None, 'SAVE': save, 'NCHW': nchw, 'C': C}
    tensors = (x, branch, keep, weight, bias, total, out, mean, rstd)
    largest = 4 * TILE if nchw else 0
    _launch(_add_norm, _blocks(rows, C, largest), tensors, (eps, rows, image_rows), constants, largest)
    return total, out, mean, rstd


@_add_norm_op.register_fake
def _add_norm_fake(x, branch, keep, weight, bias, eps, dtype, save, nchw):
    total_dtype = None if branch is None else torch.promote_types(x.dtype, branch.dtype)
    total, out, mean, rstd = _allocate(x, total_dtype, dtype, save)
    return total, _empty(x, (len(x), x.shape[-1], *x.shape[1:-1]), dtype) if nchw else out, mean, rstd


@custom_op('swin_mm::add_norm_backward')
def _add_norm_backward_op(
    grad_total: Tensor | None,
    grad_out: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    nchw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the branch (empty without ``branch_dtype``), and of weight and bias, (2, C)."""
    return _add_norm_gradients(grad_total, grad_out, total, mean, rstd, keep, weight, x_dtype, branch_dtype, nchw)


def _add_norm_gradients(grad_total, grad_out, total, mean, rstd, keep, weight, x_dtype, branch_dtype, nchw):
    grad_x, grad_branch, _ = _add_norm_backward_fake(
        grad_total, grad_out, total, mean, rstd, keep, weight, x_dtype, branch_dtype, nchw
    )
    C = total.shape[-1]
    rows, image_rows = _sizes(total)
    largest = 2 * TILE if nchw else 0  # more would not fit the registers
    programs = min(PROGRAMS, _blocks(rows, C, largest))
    parts = _empty(total, (programs, 2, C))
    grad_total = None if grad_total is None else grad_total.contiguous()
    constants = {
        'TOTAL': grad_total is not None,
        'BRANCH': branch_dtype is not None,
        'KEEP': keep is not None,
        'NCHW': nchw,
        'C': C,
    }
    tensors = (grad_total, grad_out.contiguous(), total, mean, rstd, keep, weight, grad_x, grad_branch, parts)
    _launch(_add_norm_backward, programs, tensors, (rows, image_rows, programs), constants, largest)
    return grad_x, grad_branch, parts.sum(0)


@_add_norm_backward_op.register_fake
def _add_norm_backward_fake(grad_total, grad_out, total, mean, rstd, keep, weight, x_dtype, branch_dtype, nchw):
    grad_branch = _empty(total) if branch_dtype is None else _empty(total, total.shape, branch_dtype)
    return _empty(total, total.shape, x_dtype), grad_branch, _empty(total, (2, total.shape[-1]))


@custom_op('swin_mm::norm_add')
def _norm_add_op(
    x: Tensor,
    branch: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total_dtype: torch.dtype,
    dtype: torch.dtype | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total, its copy in ``dtype`` (empty without), mean and inverse standard deviation of the branch (if ``save``)."""
    return _norm_add_forward(x, branch, keep, weight, bias, eps, total_dtype, dtype, save)


def _norm_add_forward(x, branch, keep, weight, bias, eps, total_dtype, dtype, save):
    x, branch = x.contiguous(), branch.contiguous()
    total, out, mean, rstd = _norm_add_fake(x, branch, keep, weight, bias, eps, total_dtype, dtype, save)
    rows, image_rows = _sizes(x)
    constants = {'OUT': dtype is not None, 'KEEP': keep is not None, 'SAVE': save, 'C': x.shape[-1]}
    tensors = (x, branch, keep, weight, bias, total, out, mean, rstd)
    _launch(_norm_add, _blocks(rows, x.shape[-1]), tensors, (eps, rows, image_rows), constants)
    return total, out, mean, rstd


@_norm_add_op.register_fake
def _norm_add_fake(x, branch, keep, weight, bias, eps, total_dtype, dtype, save):
    return _allocate(x, total_dtype, dtype, save)


@custom_op('swin_mm::norm_add_backward')
def _norm_add_backward_op(
    grad_total: Tensor | None,
    grad_out: Tensor | None,
    branch: Tensor,
    mean: Tensor,
    rstd: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    x_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty without ``x_dtype``), of the branch, and of weight and bias, (2, C)."""
    return _norm_add_gradients(grad_total, grad_out, branch, mean, rstd, keep, weight, x_dtype)


def _norm_add_gradients(grad_total, grad_out, branch, mean, rstd, keep, weight, x_dtype):
    grad_x, grad_branch, _ = _norm_add_backward_fake(grad_total, grad_out, branch, mean, rstd, keep, weight, x_dtype)
    C = branch.shape[-1]
    rows, image_rows = _sizes(branch)
    programs = min(PROGRAMS, _blocks(rows, C))
    parts = _empty(branch, (programs, 2, C))
    grad_total, grad_out = (None if g is None else g.contiguous() for g in (grad_total, grad_out))
    constants = {
        'TOTAL': grad_total is not None,
        'OUT': grad_out is not None,
        'X': x_dtype is not None,
        'KEEP': keep is not None,
        'C': C,
    }
    tensors = (grad_total, grad_out, branch, mean, rstd, keep, weight, grad_x, grad_branch, parts)
    _launch(_norm_add_backward, programs, tensors, (rows, image_rows, programs), constants)
    return grad_x, grad_branch, parts.sum(0)


@_norm_add_backward_op.register_fake
def _norm_add_backward_fake(grad_total, grad_out, branch, mean, rstd, keep, weight, x_dtype):
    grad_x = _empty(branch) if x_dtype is None else _empty(branch, branch.shape, x_dtype)
    return grad_x, torch.empty_like(branch), _empty(branch, (2, branch.shape[-1]))


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError('the fused norms have no second derivative; build the model without fused_norm')


_add_norm_backward_op.register_autograd(_no_second_derivative)
_norm_add_backward_op.register_autograd(_no_second_derivative)


class _AddNorm(Function):
    @staticmethod
    def forward(ctx, x, branch, keep, weight, bias, eps, dtype, nchw):
        run = _add_norm_op if operators_are_seen(x) else _add_norm_forward
        total, out, mean, rstd = run(x, branch, keep, weight, bias, eps, dtype, True, nchw)
        if branch is None:
            total = x.view_as(x)
        ctx.save_for_backward(total, mean, rstd, keep, weight)
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.nchw = (x.dtype, None if branch is None else branch.dtype), nchw
        return total, out

    @staticmethod
    def backward(ctx, grad_total, grad_out):
        total, mean, rstd, keep, weight = ctx.saved_tensors
        x_dtype, branch_dtype = ctx.dtypes
        if grad_out is None:
            grad_out = torch.zeros_like(total.movedim(-1, 1) if ctx.nchw else total)
        # Without a factor and with equal types, the two gradients are one.
        separate = branch_dtype is not None and (keep is not None or branch_dtype != x_dtype)
        seen = torch.is_grad_enabled() or operators_are_seen(grad_out)
        run = _add_norm_backward_op if seen else _add_norm_gradients
        dtypes = x_dtype, branch_dtype if separate else None
        grads = run(grad_total, grad_out, total.contiguous(), mean, rstd, keep, weight, *dtypes, ctx.nchw)
        grad_x, grad_branch, sums = grads
        if branch_dtype is not None and not separate:
            grad_branch = grad_x
        grad_weight, grad_bias = sums.to(weight.dtype)
        return grad_x, None if branch_dtype is None else grad_branch, None, grad_weight, grad_bias, None, None, None


class _NormAdd(Function):
    @staticmethod
    def forward(ctx, x, branch, keep, weight, bias, eps, total_dtype, dtype):
        run = _norm_add_op if operators_are_seen(x) else _norm_add_forward
        total, out, mean, rstd = run(x, branch, keep, weight, bias, eps, total_dtype, dtype, True)
        ctx.save_for_backward(branch, mean, rstd, keep, weight)
        ctx.set_materialize_grads(False)
        ctx.x_dtype, ctx.total_dtype = x.dtype, total_dtype
        return total, None if dtype is None else out

    @staticmethod
    def backward(ctx, grad_total, grad_out):
        branch, mean, rstd, keep, weight = ctx.saved_tensors
        if grad_total is None and grad_out is None:
            return (None,) * 8
        same = grad_out is None and ctx.x_dtype == ctx.total_dtype
        seen = torch.is_grad_enabled() or operators_are_seen(branch)
        run = _norm_add_backward_op if seen else _norm_add_gradients
        grad_x, grad_branch, sums = run(
            grad_total, grad_out, branch.contiguous(), mean, rstd, keep, weight, None if same else ctx.x_dtype
        )
        grad_weight, grad_bias = sums.to(weight.dtype)
        return grad_total if same else grad_x, grad_branch, None, grad_weight, grad_bias, None, None, None


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    keep: Tensor | None = None,
    nchw: bool = False,
) -> tuple[Tensor, Tensor]:
    """``total = x + keep * branch`` and its LayerNorm over the channels.

    Args:
        x: (B, ..., C).
        branch: of the same shape; None for x alone.
        weight: (C,) of the norm.
        bias: (C,) of the norm.
        eps: of the norm.
        dtype: of the result of the norm; the computation is in float32.
        keep: factor for each image, B elements; None for 1.
        nchw: return the norm as (B, C, ...).

    Returns:
        The total, in the type that PyTorch's addition gives (x itself without a branch), and its norm.
    """
    tensors = (x, branch, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _AddNorm.apply(x, branch, keep, weight, bias, eps, dtype, nchw)
    run = _add_norm_op if operators_are_seen(x) else _add_norm_forward
    total, out, _, _ = run(x, branch, keep, weight, bias, eps, dtype, False, nchw)
    return x if branch is None else total, out


def norm_add(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total_dtype: torch.dtype,
    dtype: torch.dtype,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = x + keep * LayerNorm(branch)``, and the total in ``dtype``.

    Args:
        x: (B, ..., C).
        branch: of the same shape.
        weight: (C,) of the norm.
        bias: (C,) of the norm.
        eps: of the norm.
        total_dtype: of the total.
        dtype: of its copy; the computation is in float32.
        keep: factor for each image, B elements; None for 1.

    Returns:
        The total and its copy, which is the total itself if the types are equal.
    """
    copy = None if dtype == total_dtype else dtype
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, branch, weight, bias)):
        total, out = _NormAdd.apply(x, branch, keep, weight, bias, eps, total_dtype, copy)
    else:
        run = _norm_add_op if operators_are_seen(x) else _norm_add_forward
        total, out, _, _ = run(x, branch, keep, weight, bias, eps, total_dtype, copy, False)
    return total, total if copy is None else out


@custom_op('swin_mm::merge_norm')
def _merge_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, mean and inverse standard deviation (if ``save``)."""
    return _merge_norm_forward(x, weight, bias, eps, dtype, save)


def _merged(x: Tensor) -> tuple[int, int, int]:
    """Rows of the merged map in all images, and those down and across a map."""
    down, across = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
    return x.shape[0] * down * across, down, across


@_merge_norm_op.register_fake
def _merge_norm_fake(x, weight, bias, eps, dtype, save):
    rows, down, across = _merged(x)
    sums = [_empty(x, (rows if save else 0,)) for _ in range(2)]
    return _empty(x, (x.shape[0], down, across, 4 * x.shape[3]), dtype), *sums


def _merge_norm_forward(x, weight, bias, eps, dtype, save):
    x = x.contiguous()
    out, mean, rstd = _merge_norm_fake(x, weight, bias, eps, dtype, save)
    rows, down, across = _merged(x)
    numbers = (eps, rows, x.shape[1], x.shape[2], down, across)
    tensors = (x, weight, bias, out, mean, rstd)
    _launch(_merge_norm, _blocks(rows, x.shape[3]), tensors, numbers, {'SAVE': save, 'C': x.shape[3]})
    return out, mean, rstd


@custom_op('swin_mm::merge_norm_backward')
def _merge_norm_backward_op(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight and bias, (2, 4 * C)."""
    return _merge_norm_gradients(grad, x, mean, rstd, weight)


def _merge_norm_gradients(grad, x, mean, rstd, weight):
    grad_x, C = torch.empty_like(x), x.shape[3]
    rows, down, across = _merged(x)
    programs = min(PROGRAMS, _blocks(rows, C))
    parts = _empty(x, (programs, 2, 4 * C))
    numbers = (rows, x.shape[1], x.shape[2], down, across, programs)
    tensors = (grad.contiguous(), x, mean, rstd, weight, grad_x, parts)
    _launch(_merge_norm_backward, programs, tensors, numbers, {'C': C})
    return grad_x, parts.sum(0)


@_merge_norm_backward_op.register_fake
def _(grad, x, mean, rstd, weight):
    return torch.empty_like(x), _empty(x, (2, 4 * x.shape[3]))


_merge_norm_backward_op.register_autograd(_no_second_derivative)


class _MergeNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        x = x.contiguous()
        run = _merge_norm_op if operators_are_seen(x) else _merge_norm_forward
        out, mean, rstd = run(x, weight, bias, eps, dtype, True)
        ctx.save_for_backward(x, mean, rstd, weight)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight = ctx.saved_tensors
        seen = torch.is_grad_enabled() or operators_are_seen(grad)
        run = _merge_norm_backward_op if seen else _merge_norm_gradients
        grad_x, sums = run(grad, x, mean, rstd, weight)
        grad_weight, grad_bias = sums.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def merge_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm of the stacked channels of 2 x 2 neighbours, zero-padded.

    Args:
        x: (B, H, W, C).
        weight: (4C,) of the norm.
        bias: (4C,) of the norm.
        eps: of the norm.
        dtype: of the result.

    Returns:
        (B, ceil(H / 2), ceil(W / 2), 4C), neighbours column by column.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return _MergeNorm.apply(x, weight, bias, eps, dtype)
    run = _merge_norm_op if operators_are_seen(x) else _merge_norm_forward
    return run(x, weight, bias, eps, dtype, False)[0]


def unsupported_reason(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why the kernels do not support such maps, or None if they do."""
    if triton is None:
        return 'triton is not installed or does not import'
    if reason := version_problem():
        return reason
    if dtype not in DTYPES:
        return f'they do not compute in {dtype}'
    if channels > MAX_CHANNELS:
        return f'{channels} channels are more than {MAX_CHANNELS}'
    if device.type != 'meta' and device.type != 'cuda' and not triton.knobs.runtime.interpret:
        return f'they do not run on {device.type}'
    return None


class Case(NamedTuple):
    """What the kernels are compiled for; see :func:`is_trusted`."""

    kind: str
    training: bool
    device: torch.device
    channels: int
    x: torch.dtype
    branch: torch.dtype
    weight: torch.dtype
    out: torch.dtype

    def __str__(self) -> str:
        """The case in messages."""
        what = {'post': 'LayerNorm and addition', 'merge': 'patch merging and LayerNorm'}
        name = what.get(self.kind, 'addition and LayerNorm')
        return f'{name} of {self.channels} channels, {self.x} and {self.branch} to {self.out}, on {self.device}'


def is_trusted(kind: str, x: Tensor, branch: Tensor | None, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel may be used for such maps: it supports them, and gives what the definition gives.

    The first use of each combination is checked, where gradients are on also its gradients, except on tensors without
    data, in compiled code, and while a CUDA graph is captured; the kernels are trusted there.

    Args:
        kind: 'add' for :func:`add_norm`, 'nchw' for the same with ``nchw``, 'post' for :func:`norm_add`, 'merge' for
            :func:`merge_norm`.
        x: residual stream, (B, ..., C).
        branch: of the same shape, or None.
        weight: of the norm.
        dtype: of the result.
    """
    if unsupported_reason(x.device, x.dtype, x.shape[-1]):
        return False
    if operators_are_seen(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    dtypes = x.dtype, (x if branch is None else branch).dtype, weight.dtype, dtype
    key = Case(kind, torch.is_grad_enabled(), x.device, x.shape[-1], *dtypes)
    return verification.verified(
        key, lambda: _example(key, exact=False), lambda: _example(key, exact=True), verification.LIMITS[dtype]
    )


def _example(case: Case, exact: bool) -> list[Tensor]:
    """Results and gradients for two small maps: of a kernel, or of the definition in float64."""
    shape = (2, 5, 7, case.channels)

    def parameter(*shape: int, step: float, offset: float, dtype: torch.dtype) -> Tensor:
        values = verification.wave(shape, step, case.device).add_(offset).to(dtype)
        return (values.double() if exact else values).requires_grad_()

    parameters = case.channels * (4 if case.kind == 'merge' else 1)
    x = parameter(*shape, step=2.3, offset=0.3, dtype=case.x)
    branch = parameter(*shape, step=1.7, offset=0.0, dtype=case.branch)
    weight = parameter(parameters, step=1.9, offset=1.5, dtype=case.weight)
    bias = parameter(parameters, step=1.1, offset=0.0, dtype=case.weight)
    keep = torch.tensor([0.5, 1.5], device=case.device, dtype=torch.float64 if exact else case.branch)
    options = (weight, bias, 1e-5)
    with torch.set_grad_enabled(case.training):
        if exact:
            results = reference(case.kind, x, branch, *options, keep if case.training else None)
        elif case.kind == 'merge':
            results = (merge_norm(x, *options, case.out),)
        elif case.kind == 'post':
            total = torch.promote_types(case.x, case.branch)
            results = norm_add(x, branch, *options, total, case.out, keep if case.training else None)
        else:
            nchw = case.kind == 'nchw'
            results = add_norm(x, branch, *options, case.out, keep if case.training else None, nchw)
        if not case.training:
            return [*results]
        loss = torch.zeros((), dtype=torch.float64, device=case.device)
        for result in results:
            factors = torch.arange(result.numel(), dtype=torch.float64, device=case.device).mul_(1.3).cos_()
            loss = loss + (result * factors.view(result.shape)).sum()
        inputs = (x, weight, bias) if case.kind == 'merge' else (x, branch, weight, bias)
        return [*results, *torch.autograd.grad(loss, inputs)]


def reference(
    kind: str,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    keep: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The definition of the kernels, in elementary operators and one type; ``kind`` is that of :func:`is_trusted`."""

    def norm(values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], weight, bias, eps)

    if kind == 'merge':  # of x alone
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return (norm(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)),)
    total = x
    if branch is not None:
        added = norm(branch) if kind == 'post' else branch
        total = x + (added if keep is None else added * keep.view(-1, *[1] * (x.ndim - 1)))
    if kind == 'post':
        return total, total
    return total, norm(total).movedim(-1, 1) if kind == 'nchw' else norm(total)
