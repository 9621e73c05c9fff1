"""Softmax cross-entropy, loss and gradient, in Triton.

  loss      of a row x with target y: (m − x_y) + log s, with m = max x and s = Σ exp(x − m); label smoothing mixes in
            (m − mean x) + log s, and the z-loss adds z · (m + log s)²
  gradient  weight · (p − t + ε (t − 1 / V) + 2 z lse p) with p = exp(x − m) / s and t = [column = y], times 1 − tanh²
            where a softcap made x; `weight` is the gradient of the row's loss, 1 / count and all, 0 for an ignored row
  rows      up to 8192 logits: whole rows in registers, several in one program while they are short, so that the logits
            are read once and the gradient written once. Longer rows pass twice, 4096 at a time: once for m and s,
            rescaling s when m grows, once for the gradient. A row of 50257 in bfloat16 has 100 KB, and those in flight
            stay in the L2 cache between the two passes.
The gradient can be made in the forward or in the backward by the same code: then m and s, the normalisers, are read.
No logits are copied, in no dtype, and nothing is added up by two programs. A target out of range reads nothing and
makes its row's loss and gradient NaN.

In kernels X, Y … are pointers and x, y … values. N rows of V logits; X's rows are row_stride apart, DX's V.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-any-return"

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from chargpt.kernels.backends.triton.numerics import narrow, tanh

LONGEST_WHOLE_ROW = 8192
# Numbers that one program counts or adds: this project's batch, 64 x 256 rows, in one launch, and 2²⁸ in two. They are
# 32 for each of its 512 threads, all under way at once, so a program waits for memory once.
ADDED_AT_ONCE = 16384
_VARIABLE = ["N", "ignore_index"]  # one compilation serves all values


# ------------------------------------------------------------------------------------------------ what they share


@triton.jit
def capped(x, softcap, CAPPED: tl.constexpr):
    """softcap · tanh(x / softcap), and what its derivative multiplies a gradient by; or x itself, and 1."""
    if CAPPED:
        value, slope = tanh(x / softcap)
        return softcap * value, slope
    else:
        return x, 1.0


@triton.jit
def losses_of(m, s, target_logit, total, V, smoothing, z_loss, SMOOTHED: tl.constexpr, WITH_Z: tl.constexpr):
    """total: the sum of the row's logits, which only smoothing needs."""
    log_s = tl.log(s)
    loss = m - target_logit + log_s  # in this order: m − x is exact where it is small
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * (m - total / V + log_s)
    if WITH_Z:
        loss += z_loss * (m + log_s) * (m + log_s)
    return loss


@triton.jit
def weights_of(rows, here, y, V, ignore_index, SCALE, UPSTREAM, PER_ROW: tl.constexpr):
    """What multiplies each row's gradient. SCALE: 1 / count, or None; UPSTREAM: the loss's gradient, or None."""
    weight = tl.where(y == ignore_index, 0.0, 1.0)
    if SCALE is not None:
        weight *= tl.load(SCALE)
    if UPSTREAM is not None and PER_ROW:
        weight *= tl.load(UPSTREAM + rows, mask=here, other=0.0)
    elif UPSTREAM is not None:
        weight *= tl.load(UPSTREAM)
    return tl.where((y == ignore_index) | ((y >= 0) & (y < V)), weight, float("nan"))


@triton.jit
def gradients_of(
    x, slope, is_target, m, s, weight, V, smoothing, z_loss, SMOOTHED: tl.constexpr, WITH_Z: tl.constexpr
):  # fmt: skip
    """In this order what nearly cancels at a target that is nearly certain cancels exactly."""
    p = tl.exp(x - m) * (1.0 / s)
    dx = p - tl.where(is_target, 1.0, 0.0)
    if SMOOTHED:
        dx += smoothing * tl.where(is_target, 1.0 - 1.0 / V, -1.0 / V)
    if WITH_Z:
        dx += p * (2.0 * z_loss * (m + tl.log(s)))
    return dx * weight * slope


# -------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=_VARIABLE)
def whole_rows_kernel(
    X, Y, LOSS, NORMALISERS, DX, SCALE, UPSTREAM,
    N, V, row_stride, ignore_index: tl.int64, smoothing, z_loss, softcap,
    FORWARD: tl.constexpr, PER_ROW: tl.constexpr,
    SMOOTHED: tl.constexpr, WITH_Z: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """ROWS rows in one tile (ROWS, BLOCK_V). FORWARD: make losses and normalisers; DX: for the gradient, or None."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_V)[None, :]
    here = rows < N
    real = here[:, None] & (columns < V)
    y = tl.load(Y + rows, mask=here, other=0).to(tl.int64)
    x = tl.load(X + rows[:, None] * row_stride + columns, mask=real, other=0.0).to(tl.float32)
    x, slope = capped(x, softcap, CAPPED)
    x = tl.where(columns < V, x, float("-inf"))
    is_target = columns == y[:, None]
    if FORWARD:
        m = tl.max(x, 1)
        s = tl.sum(tl.exp(x - m[:, None]), 1)
        target_logit = tl.sum(tl.where(is_target, x, 0.0), 1)
        total = tl.sum(tl.where(columns < V, x, 0.0), 1)
        loss = losses_of(m, s, target_logit, total, V, smoothing, z_loss, SMOOTHED, WITH_Z)
        loss = tl.where((y >= 0) & (y < V), loss, float("nan"))
        tl.store(LOSS + rows, tl.where(y == ignore_index, 0.0, loss), mask=here)
        tl.store(NORMALISERS + rows, m, mask=here)
        tl.store(NORMALISERS + N + rows, s, mask=here)
    else:
        m = tl.load(NORMALISERS + rows, mask=here, other=0.0)
        s = tl.load(NORMALISERS + N + rows, mask=here, other=1.0)
    if DX is not None:
        weight = weights_of(rows, here, y, V, ignore_index, SCALE, UPSTREAM, PER_ROW)
        dx = gradients_of(
            x, slope, is_target, m[:, None], s[:, None], weight[:, None], V, smoothing, z_loss, SMOOTHED, WITH_Z
        )  # fmt: skip
        tl.store(DX + rows[:, None] * V + columns, narrow(dx, DX.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=_VARIABLE)
def long_rows_kernel(
    X, Y, LOSS, NORMALISERS, DX, SCALE, UPSTREAM,
    N, V, row_stride, ignore_index: tl.int64, smoothing, z_loss, softcap,
    FORWARD: tl.constexpr, PER_ROW: tl.constexpr, SMOOTHED: tl.constexpr, WITH_Z: tl.constexpr, CAPPED: tl.constexpr,
    ALIGN: tl.constexpr, ALIKE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row, BLOCK_V logits at a time. Needs V ≥ BLOCK_V.

    A row of odd length starts anywhere. The first block begins up to ALIGN elements, 16 bytes, before it, at a multiple
    of 16 bytes, so that all blocks but the first and the last need no mask and are moved by 16 bytes at a time.
    ALIKE: whether the rows of X and DX start at the same distance from a multiple of 16 bytes
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    before = (row * row_stride % ALIGN).to(tl.int32)
    x_row = X + tl.multiple_of(row * row_stride - before, ALIGN)
    whole = (V + before) // BLOCK_V * BLOCK_V
    y = tl.load(Y + row).to(tl.int64)
    in_range = (y >= 0) & (y < V)
    if FORWARD:
        m = float("-inf")
        s = tl.zeros((BLOCK_V,), tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        for part in tl.static_range(3):  # the first block, those that lie inside the row, the last
            for start in tl.range(begin_of(part, whole, BLOCK_V), end_of(part, whole, before + V, BLOCK_V), BLOCK_V):
                x, _, real = load_block(x_row, start, before, V, softcap, part != 1, CAPPED, ALIGN, BLOCK_V)
                m_new = tl.maximum(m, tl.max(x, 0))
                base = tl.where(m_new == float("-inf"), 0.0, m_new)  # all −∞ so far
                s = s * tl.exp(m - base) + tl.exp(x - base)
                total += tl.where(real, x, 0.0)
                m = m_new
        s = tl.sum(s, 0)
        target_logit = tl.load(X + row * row_stride + y, mask=in_range, other=0.0).to(tl.float32)
        target_logit, _ = capped(target_logit, softcap, CAPPED)
        loss = losses_of(m, s, target_logit, tl.sum(total, 0), V, smoothing, z_loss, SMOOTHED, WITH_Z)
        loss = tl.where(in_range, loss, float("nan"))
        tl.store(LOSS + row, tl.where(y == ignore_index, 0.0, loss))
        tl.store(NORMALISERS + row, m)
        tl.store(NORMALISERS + N + row, s)
    else:
        m = tl.load(NORMALISERS + row)
        s = tl.load(NORMALISERS + N + row)
    if DX is not None:
        weight = weights_of(row, True, y, V, ignore_index, SCALE, UPSTREAM, PER_ROW)
        dx_start = row * V - before
        if ALIKE:
            dx_start = tl.multiple_of(dx_start, ALIGN)
        for part in tl.static_range(3):
            for start in tl.range(begin_of(part, whole, BLOCK_V), end_of(part, whole, before + V, BLOCK_V), BLOCK_V):
                x, slope, real = load_block(x_row, start, before, V, softcap, part != 1, CAPPED, ALIGN, BLOCK_V)
                is_target = start + lanes - before == y
                dx = gradients_of(x, slope, is_target, m, s, weight, V, smoothing, z_loss, SMOOTHED, WITH_Z)
                addresses = DX + dx_start + tl.multiple_of(start, ALIGN) + lanes
                if part != 1:
                    tl.store(addresses, narrow(dx, DX.dtype.element_ty), mask=real)
                else:
                    tl.store(addresses, narrow(dx, DX.dtype.element_ty))


@triton.jit
def begin_of(part: tl.constexpr, whole, BLOCK_V: tl.constexpr):
    return 0 if part == 0 else BLOCK_V if part == 1 else whole


@triton.jit
def end_of(part: tl.constexpr, whole, end, BLOCK_V: tl.constexpr):
    return BLOCK_V if part == 0 else whole if part == 1 else end


@triton.jit
def load_block(
    x_row, start, before, V, softcap, MASKED: tl.constexpr, CAPPED: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """x from `start` on, −∞ outside the row; the softcap's slope; and which of them are in the row."""
    columns = start + tl.arange(0, BLOCK_V) - before
    real = (columns >= 0) & (columns < V)
    addresses = x_row + tl.multiple_of(start, ALIGN) + tl.arange(0, BLOCK_V)
    x = tl.load(addresses, mask=real, other=0.0) if MASKED else tl.load(addresses)
    x, slope = capped(x.to(tl.float32), softcap, CAPPED)
    if MASKED:
        x = tl.where(real, x, float("-inf"))
    return x, slope, real


@triton.jit(do_not_specialize=_VARIABLE)
def count_kernel(X, OUT, N: tl.int64, ignore_index: tl.int64, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program counts the targets in its BLOCK numbers of X that are not ignored, or adds them up if X are COUNTS.

    OUT: int64 for the programs' counts; or float32, for the single program that makes 1 / the count, at least 1. The
        division has 64 bits, because not every count has a float32.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < N, other=0).to(tl.int64)
    if not COUNTS:
        x = ((at < N) & (x != ignore_index)).to(tl.int64)
    count = tl.sum(x, 0)
    if OUT.dtype.element_ty == tl.float32:
        tl.store(OUT, (1.0 / tl.maximum(count, 1).to(tl.float64)).to(tl.float32))
    else:
        tl.store(OUT + tl.program_id(0), count)


@triton.jit(do_not_specialize=_VARIABLE)
def sum_kernel(X, SCALE, OUT, N: tl.int64, BLOCK: tl.constexpr):
    """Each program adds up its BLOCK numbers of X. SCALE: what multiplies the sum of a single program, or None."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(X + at, mask=at < N, other=0.0), 0)
    if SCALE is not None:
        total *= tl.load(SCALE)
    tl.store(OUT + tl.program_id(0), total)


@triton.jit(do_not_specialize=["N"])
def scale_kernel(DX, FACTOR, N, BLOCK: tl.constexpr):
    factor = tl.load(FACTOR)
    if factor != 1.0:
        for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, N, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            dx = tl.load(DX + at, mask=at < N).to(tl.float32) * factor
            tl.store(DX + at, narrow(dx, DX.dtype.element_ty), mask=at < N)


# ------------------------------------------------------------------------------------------------------------- launches


def softmax_cross_entropy_forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    with_gradient: bool,
    *,
    autotune: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, the normalisers m and s (2, N) of the rows, and the reduced loss's gradient if it is wanted.

    autotune: time a short list of block sizes, once for each kind of call, instead of taking the table's
    """
    rows, y = _as_rows(logits), targets.reshape(-1).contiguous()
    N = rows.shape[0]
    losses, normalisers = (rows.new_empty(shape, dtype=torch.float32) for shape in ((N,), (2, N)))
    gradient = logits.new_empty(logits.shape) if with_gradient else None
    with torch.cuda.device_of(logits):
        scale = _one_over_count(y, ignore_index) if reduction == "mean" else None
        tensors = (rows, y, losses, normalisers, gradient, scale, None)
        options = (ignore_index, label_smoothing, z_loss, softcap)
        _launch(tensors, options, autotune, FORWARD=True, PER_ROW=False)
        if reduction == "none":
            return losses.view(targets.shape), normalisers, gradient
        return _sum(losses, scale), normalisers, gradient


def softmax_cross_entropy_backward(
    loss_gradient: Tensor,
    logits: Tensor,
    targets: Tensor,
    normalisers: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    *,
    autotune: bool = False,
) -> Tensor:
    """The gradient of the logits, from the normalisers of the forward."""
    rows, y = _as_rows(logits), targets.reshape(-1).contiguous()
    gradient = logits.new_empty(logits.shape)
    upstream = loss_gradient.float().reshape(-1).contiguous()
    with torch.cuda.device_of(logits):
        scale = _one_over_count(y, ignore_index) if reduction == "mean" else None
        tensors = (rows, y, None, normalisers.contiguous(), gradient, scale, upstream)
        options = (ignore_index, label_smoothing, z_loss, softcap)
        _launch(tensors, options, autotune, FORWARD=False, PER_ROW=reduction == "none")
    return gradient


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient ← factor · gradient, contiguous, for one number that the GPU holds. Nothing is moved for 1."""
    if gradient.numel() == 0:
        return
    with torch.cuda.device_of(gradient):
        grid = (min(1024, triton.cdiv(gradient.numel(), 4096)),)
        scale_kernel[grid](gradient, factor, gradient.numel(), BLOCK=4096, num_warps=4)


def _as_rows(logits: Tensor) -> Tensor:
    """(N, V), each row contiguous: a view where the strides allow it."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _one_over_count(x: Tensor, ignore_index: int, are_counts: bool = False) -> Tensor:
    """x (N,): targets, or counts of them."""
    programs = max(1, triton.cdiv(x.numel(), ADDED_AT_ONCE))
    out = x.new_empty((programs,), dtype=torch.int64 if programs > 1 else torch.float32)
    count_kernel[(programs,)](x, out, x.numel(), ignore_index, are_counts, ADDED_AT_ONCE, num_warps=16)
    return _one_over_count(out, ignore_index, are_counts=True) if programs > 1 else out.view(())


def _sum(x: Tensor, scale: Tensor | None) -> Tensor:
    """scale · Σ x of x (N,): programs add a part each, and the same again adds the parts, in an order that depends on N
    alone."""
    programs = max(1, triton.cdiv(x.numel(), ADDED_AT_ONCE))
    out = x.new_empty((programs,))
    sum_kernel[(programs,)](x, scale if programs == 1 else None, out, x.numel(), ADDED_AT_ONCE, num_warps=16)
    return _sum(out, scale) if programs > 1 else out.view(())


def _launch(tensors: tuple[Any, ...], options: tuple[Any, ...], autotune: bool, **modes: bool) -> None:
    """tensors: X, Y, LOSS, NORMALISERS, DX, SCALE, UPSTREAM; options: ignore_index, smoothing, z_loss, softcap"""
    X = tensors[0]
    (N, V), row_stride = X.shape, X.stride(0)
    if N == 0:
        return
    ignore_index, smoothing, z_loss, softcap = options
    modes |= {"SMOOTHED": smoothing > 0, "WITH_Z": z_loss > 0, "CAPPED": softcap is not None}
    arguments = (*tensors, N, V, row_stride, ignore_index, smoothing, z_loss, softcap or 1.0)
    if V <= LONGEST_WHOLE_ROW:
        block = max(16, triton.next_power_of_2(V))
        kernel = _autotuned_whole_rows(block) if autotune else whole_rows_kernel
        tiles = {} if autotune else whole_rows_tiles(block).all_kwargs()
        kernel[lambda meta: (triton.cdiv(N, meta["ROWS"]),)](*arguments, **modes, BLOCK_V=block, **tiles)
    else:
        align = 16 // X.element_size()
        kernel = _autotuned_long_rows() if autotune else long_rows_kernel
        tiles = {} if autotune else LONG_ROWS.all_kwargs()
        if tiles and softcap is not None and X.dtype == torch.float32:
            tiles["maxnreg"] = 255  # of 200 that it could use, ptxas takes 128 and spills 8 bytes
        kernel[(N,)](*arguments, **modes, ALIGN=align, ALIKE=(row_stride - V) % align == 0, **tiles)


# Reasoned, not measured on a GPU: 16 values for each thread. With 32, the kernels with every option on spill registers
# (34 to 68 loads and stores of spilled values for 32 rows of 128 and for one row of 16384).
LONG_ROWS = Config({"BLOCK_V": 4096}, num_warps=8)
LONG_ROWS_CANDIDATES = [
    Config({"BLOCK_V": block}, num_warps=warps)
    for block, warps in ((1024, 2), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
]


def whole_rows_tiles(block: int, values: int = 2048, num_warps: int = 4) -> Config:
    """As many rows of `block` logits as make `values`, and more warps where a single row is longer."""
    return Config({"ROWS": max(1, values // block)}, num_warps=max(num_warps, min(16, block // 512)))


def whole_rows_candidates(block: int) -> list[Config]:
    sizes = ((512, 1), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
    return list({str(tiles): tiles for tiles in (whole_rows_tiles(block, *size) for size in sizes)}.values())


@functools.cache
def _autotuned_whole_rows(block: int) -> Any:
    """Made on demand, as the next: an autotuner needs a GPU."""
    return triton.autotune(whole_rows_candidates(block), key=["V", "FORWARD", "CAPPED"])(whole_rows_kernel)


@functools.cache
def _autotuned_long_rows() -> Any:
    return triton.autotune(LONG_ROWS_CANDIDATES, key=["V", "FORWARD", "CAPPED"])(long_rows_kernel)
