"""Window attention as Triton kernels that read and write the map in place, without padded or shifted copies.

B batch, (H, W) map, (Hw, Ww) window, nW windows per padded map, N = Hw * Ww, C channels, h heads, d head size.

Memory traffic in units of X = B * H * W * C elements: the forward reads qkv (3) and writes the output (1). The
backward reads qkv and the output's gradient and writes the gradient of qkv (7); where a window needs several tiles,
three kernels read the inputs once each, and one reads the output (16). Eager code moves about 30 in the forward, 15 of
them copies for the layout and 11 scores. In addition there are the log-sum-exp (4 bytes per head and token, in training
only), the bias, which stays in the L2 cache, and partial sums for its gradient.

A program processes one head, one block of a window's tokens, and every `splits`-th window, so that the bias and the sum
of its gradient stay in registers. Partial sums go to a buffer and are added up afterwards: there are no atomics, and
results are deterministic.
"""

from __future__ import annotations  # annotations use Triton's types, which may not exist

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from swin_mm.ops.attention.derivatives import no_second_derivative, register_flops
from swin_mm.ops.windows import MASKED, Size, functorch_active
from swin_mm.utils.compat import custom_op

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform: see `unsupported_reason`
    triton = None

OLDEST_TRITON = (3, 4)  # the first with `triton.knobs` and with tuples as constants
# As many as fit by their registers, on all GPUs from Ampere on. They take equally long, so that one more than fit would
# double the time. A forward in several tiles has little to do before its loop, and 2 or 3 of it fit.
PROGRAMS_PER_SM = {'forward': 3, 'forward in tiles': 6, 'backward': 2}
TILE = 64  # largest side of a tile of scores, in tokens; limited by registers
HEAD_SIZES = (16, 32, 64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

if triton is not None:
    # The hardware's exponential has base 2, and so have scores and log-sum-exp here.
    _LOG2_E = tl.constexpr(math.log2(math.e))
    _MASKED = tl.constexpr(MASKED * math.log2(math.e))


def _jit(function):
    """``triton.jit`` for a kernel or a part of one, compiled once for all sizes of maps and batches."""
    if triton is None:
        return function
    varying = ('windows', 'H', 'W', 'down', 'across', 'shift_y', 'shift_x', 'heads', 'splits')
    return triton.jit(function, do_not_specialize=[n for n in varying if n in function.__code__.co_varnames])


# SHAPE is (Hw, Ww, pitch). A tile has a slot for each token of a window, `pitch` from one row to the next.


@_jit
def _token(slots, SHAPE: tl.constexpr):
    """For each slot the index of its token in the window, and whether the slot holds a token."""
    y, x = slots // SHAPE[2], slots % SHAPE[2]
    return y * SHAPE[1] + x, (y < SHAPE[0]) & (x < SHAPE[1])


@_jit
def _locate(window, geometry):
    """The image that a window belongs to, and the window's row and column among the windows of the padded map."""
    _, _, down, across, _, _ = geometry
    row = window // across  # remainders would be further divisions
    image = row // down
    return image, row - image * down, window - row * across


@_jit
def _place(location, slots, geometry, SHAPE: tl.constexpr):
    """For each slot the row of its token in (B * H * W), whether it is in the map, and whether there is one at all."""
    H, W, down, across, shift_y, shift_x = geometry
    image, row, column = location
    y = row * SHAPE[0] + slots // SHAPE[2] + shift_y
    x = column * SHAPE[1] + slots % SHAPE[2] + shift_x
    y -= tl.where(y >= down * SHAPE[0], down * SHAPE[0], 0)
    x -= tl.where(x >= across * SHAPE[1], across * SHAPE[1], 0)
    _, holds = _token(slots, SHAPE)
    return (image * H + y) * W + x, holds & (y < H) & (x < W), holds


@_jit
def _cuts(location, geometry, SHAPE: tl.constexpr):
    """Row and column of the window from which on its tokens come from the opposite edge of the map."""
    _, _, down, across, shift_y, shift_x = geometry
    _, row, column = location
    cut_y = SHAPE[0] - tl.where(row == down - 1, shift_y, 0)
    cut_x = SHAPE[1] - tl.where(column == across - 1, shift_x, 0)
    return cut_y, cut_x


@_jit
def _has_padding(location, geometry, SHAPE: tl.constexpr):
    """Whether there may be padding in the window."""
    H, W, _, _, shift_y, shift_x = geometry
    _, row, column = location
    below = (row + 1) * SHAPE[0] + shift_y > H
    beside = (column + 1) * SHAPE[1] + shift_x > W
    return (below & (H % SHAPE[0] > 0)) | (beside & (W % SHAPE[1] > 0))


@_jit
def _offset(rows, size):
    """Offset of rows of ``size`` elements: a product of 32-bit numbers, which takes one instruction."""
    return rows.to(tl.int64) * size


@_jit
def _load(pointers, mask, D: tl.constexpr):
    """(rows, D) from pointers to the beginning of each row; 0 where masked."""
    return tl.load(pointers[:, None] + tl.arange(0, D)[None, :], mask=mask[:, None], other=0.0)


@_jit
def _store(pointers, values, mask, D: tl.constexpr):
    values = values.to(pointers.dtype.element_ty)
    tl.store(pointers[:, None] + tl.arange(0, D)[None, :], values, mask=mask[:, None])


@_jit
def _queries(qkv, pad, rows, real, head, C, D: tl.constexpr):
    """Pointers to the slots' queries; their keys are C elements further, their values 2 * C."""
    # The compiler cannot tell that rows are aligned after `where`.
    return tl.multiple_of(tl.where(real, qkv + _offset(rows, 3 * C), pad) + head * D, 16)


@_jit
def _load_bias(bias, head, slots_i, slots_j, SHAPE: tl.constexpr):
    """Bias for slots of queries and keys that broadcast to a tile; -inf for slots without a key."""
    i, _ = _token(slots_i, SHAPE)
    j, holds = _token(slots_j, SHAPE)
    N: tl.constexpr = SHAPE[0] * SHAPE[1]
    bias += (head * N + tl.minimum(i, N - 1)) * N + j
    return tl.load(bias, mask=holds, other=float('-inf')).to(tl.float32) * _LOG2_E


@_jit
def _inverse_length(x):
    x = x.to(tl.float32)
    return 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)


@_jit
def _unit(x, COSINE: tl.constexpr):
    """Normalise the rows to length 1 for cosine attention; otherwise return x."""
    if COSINE:
        x = (x.to(tl.float32) * _inverse_length(x)[:, None]).to(x.dtype)
    return x


@_jit
def _unit_backward(grad, x, COSINE: tl.constexpr):
    """Gradient of x, given the gradient of ``_unit(x)``."""
    if COSINE:
        inverse = _inverse_length(x)[:, None]
        unit = x.to(tl.float32) * inverse
        grad = (grad - unit * tl.sum(grad * unit, 1)[:, None]) * inverse
    return grad


@_jit
def _load_keys(qkv, pad, rows, real, holds, head, C, D: tl.constexpr, COSINE: tl.constexpr):
    """Keys, of length 1 for cosine attention, and values of the slots."""
    keys = _queries(qkv, pad, rows, real, head, C, D) + C
    return _unit(_load(keys, holds, D), COSINE), _load(keys + C, holds, D)


@_jit
def _dot(a, b):
    return tl.dot(a, b, input_precision='ieee')  # float32 is not rounded to tf32


@_jit
def _scores(a, b, slots_a, slots_b, bias, factor, cuts, SHAPE: tl.constexpr):
    """Scores between the rows of a and of b."""
    scores = _dot(a, tl.trans(b)) * (factor * _LOG2_E) + bias
    cut_y, cut_x = cuts
    if (cut_y < SHAPE[0]) | (cut_x < SHAPE[1]):
        y_a, y_b = slots_a // SHAPE[2] >= cut_y, slots_b // SHAPE[2] >= cut_y
        x_a, x_b = slots_a % SHAPE[2] >= cut_x, slots_b % SHAPE[2] >= cut_x
        apart = (y_a[:, None] != y_b[None, :]) | (x_a[:, None] != x_b[None, :])
        scores += tl.where(apart, _MASKED, 0.0)
    return scores


@_jit
def _forward(
    qkv, pad, bias, scales, out, lse,
    factor, windows, H, W, down, across, shift_y, shift_x, heads, splits,
    COSINE: tl.constexpr, SHAPE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """Output and, if SAVE, log-sum-exp."""
    N: tl.constexpr = SHAPE[0] * SHAPE[1]
    SLOTS: tl.constexpr = SHAPE[0] * SHAPE[2]
    geometry = (H, W, down, across, shift_y, shift_x)
    head = (tl.program_id(0) % heads).to(tl.int64)
    C = heads * D
    if COSINE:
        factor = tl.load(scales + head)
    i = tl.arange(0, BLOCK)
    if BLOCK >= SLOTS:
        bias_tile = _load_bias(bias, head, i[:, None], i[None, :], SHAPE)
    else:
        i += tl.program_id(0) // heads // splits * BLOCK
    for window in range(tl.program_id(0) // heads % splits, windows, splits):
        location = _locate(window, geometry)
        cuts = _cuts(location, geometry, SHAPE)
        rows_i, real_i, holds_i = _place(location, i, geometry, SHAPE)
        queries = _queries(qkv, pad, rows_i, real_i, head, C, D)
        q = _unit(_load(queries, holds_i, D), COSINE)
        if BLOCK >= SLOTS:
            k = _unit(_load(queries + C, holds_i, D), COSINE)
            v = _load(queries + 2 * C, holds_i, D)
            scores = _scores(q, k, i, i, bias_tile, factor, cuts, SHAPE)
            m_i = tl.max(scores, 1)
            weights = tl.exp2(scores - m_i[:, None])
            l_i = tl.sum(weights, 1)
            result = _dot(weights.to(v.dtype), v)
        else:
            m_i = tl.full([BLOCK], float('-inf'), tl.float32)
            l_i = tl.zeros([BLOCK], tl.float32)
            result = tl.zeros([BLOCK, D], tl.float32)
            for start in range(0, SLOTS, BLOCK):
                j = start + tl.arange(0, BLOCK)
                rows_j, real_j, holds_j = _place(location, j, geometry, SHAPE)
                k, v = _load_keys(qkv, pad, rows_j, real_j, holds_j, head, C, D, COSINE)
                bias_tile = _load_bias(bias, head, i[:, None], j[None, :], SHAPE)
                scores = _scores(q, k, i, j, bias_tile, factor, cuts, SHAPE)
                m_prev = m_i
                m_i = tl.maximum(m_prev, tl.max(scores, 1))
                weights = tl.exp2(scores - m_i[:, None])
                alpha = tl.exp2(m_prev - m_i)
                l_i = l_i * alpha + tl.sum(weights, 1)
                result = result * alpha[:, None] + _dot(weights.to(v.dtype), v)
        _store(out + _offset(rows_i, C) + head * D, result * (1.0 / l_i)[:, None], real_i, D)
        if SAVE:
            token, _ = _token(i, SHAPE)
            tl.store(lse + (window * heads + head) * N + token, m_i + tl.log2(l_i), mask=holds_i)


@_jit
def _store_pad(grad_pad, sum_k, sum_v, heads, D: tl.constexpr):
    """A program's part of the gradient of padding, (3, h, D); queries of padding affect no output."""
    head = tl.program_id(0) % heads
    to = grad_pad + ((tl.program_id(0) // heads).to(tl.int64) * 3 * heads + head) * D + tl.arange(0, D)
    tl.store(to, tl.zeros([D], tl.float32))
    tl.store(to + heads * D, sum_k)
    tl.store(to + 2 * heads * D, sum_v)


@_jit
def _backward(
    qkv, pad, bias, scales, lse, grad, grad_qkv, grad_pad, grad_bias, grad_scales,
    factor, windows, H, W, down, across, shift_y, shift_x, heads, splits,
    COSINE: tl.constexpr, SHAPE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients at once, for windows that fit one tile."""
    N: tl.constexpr = SHAPE[0] * SHAPE[1]
    geometry = (H, W, down, across, shift_y, shift_x)
    head = (tl.program_id(0) % heads).to(tl.int64)
    C = heads * D
    if COSINE:
        factor = tl.load(scales + head)
    i = tl.arange(0, BLOCK)
    token, has_token = _token(i, SHAPE)
    bias_tile = _load_bias(bias, head, i[:, None], i[None, :], SHAPE)
    sum_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    sum_k = tl.zeros([D], tl.float32)
    sum_v = tl.zeros([D], tl.float32)
    sum_scale = 0.0
    for window in range(tl.program_id(0) // heads, windows, splits):
        location = _locate(window, geometry)
        rows, real, holds = _place(location, i, geometry, SHAPE)
        queries = _queries(qkv, pad, rows, real, head, C, D)
        q = _load(queries, holds, D)
        k = _load(queries + C, holds, D)
        v = _load(queries + 2 * C, holds, D)
        g = _load(grad + _offset(rows, C) + head * D, real, D)  # 0 for padding, whose outputs are discarded
        log_sum = tl.load(lse + (window * heads + head) * N + token, mask=holds, other=float('inf'))
        unit_q, unit_k = _unit(q, COSINE), _unit(k, COSINE)

        cuts = _cuts(location, geometry, SHAPE)
        weights = tl.exp2(_scores(unit_q, unit_k, i, i, bias_tile, factor, cuts, SHAPE) - log_sum[:, None])
        grad_v = _dot(tl.trans(weights.to(g.dtype)), g)
        grad_scores = weights * _dot(g, tl.trans(v))
        grad_scores -= weights * tl.sum(grad_scores, 1)[:, None]
        sum_bias += grad_scores
        grad_scores = grad_scores.to(q.dtype)
        grad_q = _dot(grad_scores, unit_k)
        if COSINE:
            sum_scale += tl.sum(grad_q * unit_q)
        grad_q = _unit_backward(grad_q * factor, q, COSINE)
        grad_k = _unit_backward(_dot(tl.trans(grad_scores), unit_q) * factor, k, COSINE)

        to = grad_qkv + _offset(rows, 3 * C) + head * D
        _store(to, grad_q, real, D)
        _store(to + C, grad_k, real, D)
        _store(to + 2 * C, grad_v, real, D)
        if _has_padding(location, geometry, SHAPE):
            sum_k += tl.sum(tl.where(real[:, None], 0.0, grad_k), 0)
            sum_v += tl.sum(tl.where(real[:, None], 0.0, grad_v), 0)

    _store_pad(grad_pad, sum_k, sum_v, heads, D)
    part = tl.program_id(0).to(tl.int64)
    if COSINE:
        tl.store(grad_scales + part, sum_scale)
    pairs = token[:, None] * N + token[None, :]
    tl.store(grad_bias + part * N * N + pairs, sum_bias, mask=has_token[:, None] & has_token[None, :])


@_jit
def _backward_q(
    qkv, pad, bias, scales, out, lse, grad, grad_qkv, delta, grad_scales,
    factor, windows, H, W, down, across, shift_y, shift_x, heads, splits,
    COSINE: tl.constexpr, SHAPE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and scales, and delta: for each query, the dot product of its output and its gradient."""
    N: tl.constexpr = SHAPE[0] * SHAPE[1]
    geometry = (H, W, down, across, shift_y, shift_x)
    head = (tl.program_id(0) % heads).to(tl.int64)
    C = heads * D
    if COSINE:
        factor = tl.load(scales + head)
    i = tl.program_id(0) // heads // splits * BLOCK + tl.arange(0, BLOCK)
    sum_scale = 0.0
    for window in range(tl.program_id(0) // heads % splits, windows, splits):
        location = _locate(window, geometry)
        cuts = _cuts(location, geometry, SHAPE)
        rows_i, real_i, holds_i = _place(location, i, geometry, SHAPE)
        q = _load(_queries(qkv, pad, rows_i, real_i, head, C, D), holds_i, D)
        unit_q = _unit(q, COSINE)
        g = _load(grad + _offset(rows_i, C) + head * D, real_i, D)
        o = _load(out + _offset(rows_i, C) + head * D, real_i, D)
        sums = (window * heads + head) * N + _token(i, SHAPE)[0]
        log_sum = tl.load(lse + sums, mask=holds_i, other=float('inf'))
        product = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + sums, product, mask=holds_i)
        grad_q = tl.zeros([BLOCK, D], tl.float32)
        for start in range(0, SHAPE[0] * SHAPE[2], BLOCK):
            j = start + tl.arange(0, BLOCK)
            rows_j, real_j, holds_j = _place(location, j, geometry, SHAPE)
            k, v = _load_keys(qkv, pad, rows_j, real_j, holds_j, head, C, D, COSINE)
            bias_tile = _load_bias(bias, head, i[:, None], j[None, :], SHAPE)
            weights = tl.exp2(_scores(unit_q, k, i, j, bias_tile, factor, cuts, SHAPE) - log_sum[:, None])
            grad_scores = weights * (_dot(g, tl.trans(v)) - product[:, None])
            grad_q += _dot(grad_scores.to(k.dtype), k)
        if COSINE:
            sum_scale += tl.sum(grad_q * unit_q)
        to = grad_qkv + _offset(rows_i, 3 * C) + head * D
        _store(to, _unit_backward(grad_q * factor, q, COSINE), real_i, D)
    if COSINE:
        tl.store(grad_scales + tl.program_id(0), sum_scale)


@_jit
def _backward_kv(
    qkv, pad, bias, scales, lse, delta, grad, grad_qkv, grad_pad,
    factor, windows, H, W, down, across, shift_y, shift_x, heads, splits,
    COSINE: tl.constexpr, SHAPE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, including those of padding. Tiles are keys by queries."""
    N: tl.constexpr = SHAPE[0] * SHAPE[1]
    geometry = (H, W, down, across, shift_y, shift_x)
    head = (tl.program_id(0) % heads).to(tl.int64)
    C = heads * D
    if COSINE:
        factor = tl.load(scales + head)
    j = tl.program_id(0) // heads // splits * BLOCK + tl.arange(0, BLOCK)
    sum_k = tl.zeros([D], tl.float32)
    sum_v = tl.zeros([D], tl.float32)
    for window in range(tl.program_id(0) // heads % splits, windows, splits):
        location = _locate(window, geometry)
        cuts = _cuts(location, geometry, SHAPE)
        rows_j, real_j, holds_j = _place(location, j, geometry, SHAPE)
        keys = _queries(qkv, pad, rows_j, real_j, head, C, D) + C
        k = _load(keys, holds_j, D)
        v = _load(keys + C, holds_j, D)
        unit_k = _unit(k, COSINE)
        grad_k = tl.zeros([BLOCK, D], tl.float32)
        grad_v = tl.zeros([BLOCK, D], tl.float32)
        for start in range(0, SHAPE[0] * SHAPE[2], BLOCK):
            i = start + tl.arange(0, BLOCK)
            rows_i, real_i, holds_i = _place(location, i, geometry, SHAPE)
            q = _unit(_load(_queries(qkv, pad, rows_i, real_i, head, C, D), holds_i, D), COSINE)
            g = _load(grad + _offset(rows_i, C) + head * D, real_i, D)
            sums = (window * heads + head) * N + _token(i, SHAPE)[0]
            log_sum = tl.load(lse + sums, mask=holds_i, other=float('inf'))
            product = tl.load(delta + sums, mask=holds_i, other=0.0)
            bias_tile = _load_bias(bias, head, i[None, :], j[:, None], SHAPE)
            weights = tl.exp2(_scores(unit_k, q, j, i, bias_tile, factor, cuts, SHAPE) - log_sum[None, :])
            grad_v += _dot(weights.to(g.dtype), g)
            grad_scores = weights * (_dot(v, tl.trans(g)) - product[None, :])
            grad_k += _dot(grad_scores.to(q.dtype), q)
        grad_k = _unit_backward(grad_k * factor, k, COSINE)
        to = grad_qkv + _offset(rows_j, 3 * C) + head * D
        _store(to + C, grad_k, real_j, D)
        _store(to + 2 * C, grad_v, real_j, D)
        if _has_padding(location, geometry, SHAPE):
            sum_k += tl.sum(tl.where(real_j[:, None], 0.0, grad_k), 0)
            sum_v += tl.sum(tl.where(real_j[:, None], 0.0, grad_v), 0)
    _store_pad(grad_pad, sum_k, sum_v, heads, D)


@_jit
def _backward_bias(
    qkv, pad, bias, scales, lse, delta, grad, grad_bias,
    factor, windows, H, W, down, across, shift_y, shift_x, heads, splits,
    COSINE: tl.constexpr, SHAPE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of the bias."""
    N: tl.constexpr = SHAPE[0] * SHAPE[1]
    BLOCKS: tl.constexpr = (SHAPE[0] * SHAPE[2] + BLOCK - 1) // BLOCK
    geometry = (H, W, down, across, shift_y, shift_x)
    head = (tl.program_id(0) % heads).to(tl.int64)
    split = tl.program_id(0) // heads % splits
    block = tl.program_id(0) // heads // splits
    C = heads * D
    if COSINE:
        factor = tl.load(scales + head)
    i = block // BLOCKS * BLOCK + tl.arange(0, BLOCK)
    j = block % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    token_i, has_i = _token(i, SHAPE)
    token_j, has_j = _token(j, SHAPE)
    bias_tile = _load_bias(bias, head, i[:, None], j[None, :], SHAPE)
    sum_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    for window in range(split, windows, splits):
        location = _locate(window, geometry)
        cuts = _cuts(location, geometry, SHAPE)
        rows_i, real_i, holds_i = _place(location, i, geometry, SHAPE)
        rows_j, real_j, holds_j = _place(location, j, geometry, SHAPE)
        q = _unit(_load(_queries(qkv, pad, rows_i, real_i, head, C, D), holds_i, D), COSINE)
        k, v = _load_keys(qkv, pad, rows_j, real_j, holds_j, head, C, D, COSINE)
        g = _load(grad + _offset(rows_i, C) + head * D, real_i, D)
        sums = (window * heads + head) * N + token_i
        log_sum = tl.load(lse + sums, mask=holds_i, other=float('inf'))
        product = tl.load(delta + sums, mask=holds_i, other=0.0)
        weights = tl.exp2(_scores(q, k, i, j, bias_tile, factor, cuts, SHAPE) - log_sum[:, None])
        sum_bias += weights * (_dot(g, tl.trans(v)) - product[:, None])
    pairs = token_i[:, None] * N + token_j[None, :]
    to = grad_bias + (split * heads + head) * N * N
    tl.store(to + pairs, sum_bias, mask=has_i[:, None] & has_j[None, :])


@lru_cache
def sm_count(device: torch.device) -> int:
    """The number of streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


@lru_cache
def _constants(dtype: torch.dtype, window: Size, head_size: int, cosine: bool, tile: int) -> tuple[dict[str, Any], int]:
    """The constants of the kernels, and the number of tiles along a window's tokens."""
    Hw, Ww = window
    pitch = triton.next_power_of_2(Ww)  # avoids a division per slot; used only if the tile does not grow
    if Hw * pitch > tile:
        pitch = Ww
    block = max(16, min(tile, triton.next_power_of_2(Hw * pitch)))  # tl.dot needs at least 16
    constants = {'COSINE': cosine, 'SHAPE': (Hw, Ww, pitch), 'D': head_size, 'BLOCK': block}
    # float32 does not use tensor cores, and its tiles need the registers of twice as many threads.
    return constants | {'num_warps': 8 if dtype == torch.float32 else 4}, -(-Hw * pitch // block)


class _Call:
    """The inputs of one call, and how its work is divided among programs."""

    def __init__(
        self,
        qkv: Tensor,
        pad: Tensor,
        bias: Tensor,
        scales: Tensor | None,
        factor: float,
        window: Sequence[int],
        shift: Sequence[int],
    ) -> None:
        B, H, W, C = qkv.shape
        Hw, Ww = window
        down, across = -(-H // Hw), -(-W // Ww)
        self.heads, self.windows = len(bias), B * down * across
        self.head_size = C // 3 // self.heads
        self.constants, self.blocks = _constants(qkv.dtype, (Hw, Ww), self.head_size, scales is not None, TILE)
        # The kernels assume aligned rows; views into larger tensors may be unaligned.
        pad = pad.to(qkv.dtype)  # not before, as autograd would record it
        qkv, pad, bias = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (qkv, pad, bias))
        self.tensors = (qkv, pad, bias.contiguous(), qkv if scales is None else scales)
        self.numbers = (factor, self.windows, H, W, down, across, *shift, self.heads)

    def splits(self, blocks: int, kind: str) -> int:
        """The number of programs among which the windows are divided, for each head and each of ``blocks`` blocks.

        All programs run at a time, so that each loads the bias once for as many windows as possible.
        """
        programs = sm_count(self.tensors[0].device) * PROGRAMS_PER_SM[kind]
        rounds = -(-self.windows // max(1, programs // (self.heads * blocks)))
        return -(-self.windows // max(1, rounds))

    def launch(self, kernel, blocks: int, kind: str, *tensors: Tensor, **constants: int) -> None:
        """Start a program for each head, split and block, head first."""
        splits = self.splits(blocks, kind)
        arguments = (*self.tensors, *tensors, *self.numbers, splits)
        launch(kernel, self.heads * splits * blocks, arguments, {'num_stages': 1, **self.constants, **constants})


def launch(kernel, programs: int, arguments: tuple, constants: dict[str, Any]) -> None:
    """Start a kernel on the device of its first argument. Everything that runs goes through this function."""
    with torch.cuda.device_of(arguments[0]):  # kernels start on the current device
        kernel[(programs,)](*arguments, **constants)


def _allocate(qkv, pad, bias, scales, factor, save, window, shift):
    """Output, and log-sum-exp (B * nW, h, N) if ``save``, otherwise empty."""
    B, H, W, C = qkv.shape
    windows = B * -(-H // window[0]) * -(-W // window[1])
    sums = (windows, *bias.shape[:2]) if save else (0,)
    out = torch.empty((B, H, W, C // 3), dtype=qkv.dtype, device=qkv.device)
    return out, torch.empty(sums, dtype=torch.float32, device=qkv.device)


def forward(
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    scales: Tensor | None,
    factor: float,
    save: bool,
    window: Sequence[int],
    shift: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Output, and what the backward pass needs of it if ``save``: log-sum-exp, (B * nW, h, N)."""
    call = _Call(qkv, pad, bias, scales, factor, window, shift)
    out, lse = _allocate(qkv, pad, bias, scales, factor, save, window, shift)
    # Load one window ahead. Elsewhere that takes registers, of which the other kernels have none left.
    stages = 3 if call.blocks == 1 and qkv.dtype != torch.float32 else 1
    kind = 'forward' if call.blocks == 1 else 'forward in tiles'
    call.launch(_forward, call.blocks, kind, out, lse, SAVE=save, num_stages=stages)
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    scales: Tensor | None,
    out: Tensor,
    lse: Tensor,
    factor: float,
    window: Sequence[int],
    shift: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, pad (in float32), bias and scales, the last one empty without scales."""
    call = _Call(qkv, pad, bias, scales, factor, window, shift)
    heads, N, _ = bias.shape
    blocks, splits = call.blocks, call.splits(call.blocks, 'backward')

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=qkv.device)

    grad = grad.contiguous()
    grad_qkv = torch.empty_like(qkv)
    grad_pad = parts(blocks * splits, 3 * heads * call.head_size)
    grad_scales = parts(blocks * splits, 0 if scales is None else heads)
    grad_bias = parts(call.splits(blocks**2, 'backward'), heads, N, N)
    if blocks == 1:
        call.launch(_backward, 1, 'backward', lse, grad, grad_qkv, grad_pad, grad_bias, grad_scales)
    else:
        delta = torch.empty_like(lse)
        call.launch(_backward_q, blocks, 'backward', out, lse, grad, grad_qkv, delta, grad_scales)
        call.launch(_backward_kv, blocks, 'backward', lse, delta, grad, grad_qkv, grad_pad)
        call.launch(_backward_bias, blocks**2, 'backward', lse, delta, grad, grad_bias)
    grad_scales = grad_scales.sum(0) if len(grad_scales[0]) else grad_scales[0]
    return grad_qkv, grad_pad.sum(0), grad_bias.sum(0).to(bias.dtype), grad_scales


# In compiled code and under modes that see operators, such as FlopCounterMode, the kernels are operators. These take
# more of the host's time than the plain autograd function below, which eager code uses.


@custom_op('swin_mm::window_attention')
def _op(
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    scales: Tensor | None,
    factor: float,
    save: bool,
    window: list[int],
    shift: list[int],
) -> tuple[Tensor, Tensor]:
    return forward(qkv, pad, bias, scales, factor, save, window, shift)


_op.register_fake(_allocate)


@custom_op('swin_mm::window_attention_backward')
def _backward_op(
    grad: Tensor, qkv: Tensor, pad: Tensor, bias: Tensor, scales: Tensor | None, out: Tensor, lse: Tensor,
    factor: float, window: list[int], shift: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, qkv, pad, bias, scales, out, lse, factor, window, shift)


@_backward_op.register_fake
def _(grad, qkv, pad, bias, scales, out, lse, factor, window, shift):
    grad_scales = qkv.new_empty(0 if scales is None else bias.shape[0], dtype=torch.float32)
    grad_pad = torch.empty_like(pad, dtype=torch.float32)
    return torch.empty_like(qkv), grad_pad, bias.new_empty(bias.shape), grad_scales


def _setup_context(ctx, inputs, output):
    *tensors, ctx.factor, ctx.save, ctx.window, ctx.shift = inputs
    if ctx.save:  # torch 2.4 calls this even where gradients are off
        ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp


def _differentiate(ctx, grad, compute) -> tuple[Tensor | None, ...]:
    grads = compute(grad, *ctx.saved_tensors, ctx.factor, ctx.window, ctx.shift)
    return *grads[:3], None if ctx.saved_tensors[3] is None else grads[3], None, None, None, None


def _backward_autograd(ctx, grad, _):
    if not ctx.save:
        raise RuntimeError('swin_mm::window_attention keeps nothing for a backward pass with save=False; pass True')
    return _differentiate(ctx, grad, _backward_op)


_op.register_autograd(_backward_autograd, setup_context=_setup_context)
_backward_op.register_autograd(no_second_derivative)
register_flops('window_attention')


class _WindowAttention(Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx, qkv, pad, bias, scales, factor, window, shift):
        pad = pad.to(qkv.dtype)
        out, lse = forward(qkv, pad, bias, scales, factor, True, window, shift)
        ctx.save_for_backward(qkv, pad, bias, scales, out, lse)
        ctx.factor, ctx.window, ctx.shift = factor, window, shift
        return out

    @staticmethod
    def backward(ctx, grad):
        # With create_graph=True the operator raises the error for second derivatives, if they are taken.
        compute = _backward_op if torch.is_grad_enabled() else backward
        return _differentiate(ctx, grad, compute)[:7]


def operators_are_seen(qkv: Tensor) -> bool:
    """Whether operators are needed: for compilers, tensor subclasses, meta tensors, dispatch modes and transforms."""
    if torch.compiler.is_compiling() or type(qkv) is not Tensor or qkv.is_meta:
        return True
    # There is no public API. Where this private one is missing, the operators are used always.
    return functorch_active() or getattr(torch._C, '_len_torch_dispatch_stack', lambda: 1)() > 0


def attention(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """See :func:`swin_mm.ops.attention.reference.attention`; for inputs that :func:`unsupported_reason` accepts."""
    scales, factor = (scale.float().flatten(), 1.0) if isinstance(scale, Tensor) else (None, scale)
    tensors = qkv.contiguous(), pad, bias, scales
    if operators_are_seen(qkv):
        return _op(*tensors, factor, torch.is_grad_enabled(), list(window), list(shift))[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _WindowAttention.apply(*tensors, factor, window, shift)
    return forward(*tensors, factor, False, window, shift)[0]


def version_problem() -> str | None:
    """Why the installed version of Triton does not compile the kernels of this package, or None if it does."""
    if tuple(map(int, re.findall(r'\d+', triton.__version__)[:2])) < OLDEST_TRITON:
        return f'triton {triton.__version__} is older than {".".join(map(str, OLDEST_TRITON))}'
    return None


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str | None:
    """Why :func:`attention` does not support such inputs, or None if it does."""
    if triton is None:
        return 'triton is not installed'
    if reason := version_problem():
        return reason
    if dropout:
        return 'it has no dropout'
    if dtype not in DTYPES:
        return f'it does not compute in {dtype}'
    if head_size not in HEAD_SIZES:
        return f'heads of {head_size} channels are not among {HEAD_SIZES}'
    if triton.knobs.runtime.interpret:
        return 'the interpreter does not multiply bfloat16' if dtype == torch.bfloat16 else None
    if device.type != 'cuda':
        return f'it does not run on {device.type}'
    if not torch.cuda.is_available():  # tensors without data can be on a GPU that is not there
        return 'there is no GPU'
    if torch.cuda.get_device_capability(device) < (8, 0):
        return 'the GPU is older than Ampere'
    return None
