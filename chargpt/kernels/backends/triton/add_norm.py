"""The norm between branches and the branches' dropout, in Triton.

  forward    a row x of C channels: n = (x − mean) / √(variance + ε) for LayerNorm, x / √(mean x² + ε) for RMSNorm, then
             times the weight and plus the bias. Mean and 1 / √… of each row are kept.
  backward   with g = dy · weight: dx = (g − mean g − n · mean(g n)) / √…, where RMSNorm has no mean g. The gradients of
             weight and bias are sums over all rows, Σ dy n and Σ dy: each program adds up its share of the rows, and
             another kernel the shares, in an order that the number of rows alone decides.
  dropout    the mask of `philox.row_keep_mask`, drawn where it is used, in both passes
Whole rows stand in registers, several in a program while they are short. Computed in float32.

In kernels X, Y … are pointers and x, y … values.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from chargpt.kernels.backends.triton.numerics import narrow
from chargpt.kernels.backends.triton.philox import keep_tile
from chargpt.kernels.ops.add_norm import LAYER_EPS, NORMS, RMS_EPS

VALUES = 2048  # of a program's tile, of four warps: 16 for each thread, as cross-entropy's
SHARES = 512  # of the rows: several for each multiprocessor of the largest GPU
_VARIABLE = ["N"]  # one compilation serves all values


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=_VARIABLE)
def norm_kernel(
    X, WEIGHT, BIAS, OUT, STATISTICS, N, C, eps, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """ROWS rows of X (N, C). STATISTICS: (2, N), of means and 1 / √…"""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    here = rows < N
    real = here[:, None] & (columns < C)[None, :]
    at = rows[:, None] * C + columns[None, :]
    x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C if LAYER else tl.zeros((ROWS,), tl.float32)
    x = tl.where(real, x - mean[:, None], 0.0)
    r = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    y = x * r[:, None]
    if WEIGHT is not None:
        y *= tl.load(WEIGHT + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + at, narrow(y, OUT.dtype.element_ty), mask=real)
    tl.store(STATISTICS + rows, mean, mask=here)
    tl.store(STATISTICS + N + rows, r, mask=here)


@triton.jit(do_not_specialize=[*_VARIABLE, "share"])
def norm_backward_kernel(
    DY, X, WEIGHT, STATISTICS, DX, DWEIGHT, DBIAS, N, C, share,
    LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`share` rows, a multiple of ROWS. DWEIGHT and DBIAS: (programs, C) in float32 for their sums, or None."""
    columns = tl.arange(0, BLOCK_C)
    weight = 1.0
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    first = tl.program_id(0).to(tl.int64) * share
    for start in tl.range(0, share, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        here = rows < N
        real = here[:, None] & (columns < C)[None, :]
        at = rows[:, None] * C + columns[None, :]
        x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)
        r = tl.load(STATISTICS + N + rows, mask=here, other=0.0)[:, None]
        if LAYER:
            x -= tl.load(STATISTICS + rows, mask=here, other=0.0)[:, None]
        n = tl.where(real, x * r, 0.0)
        g = dy * weight
        dx = g - n * (tl.sum(g * n, 1) / C)[:, None]
        if LAYER:
            dx -= (tl.sum(g, 1) / C)[:, None]
        tl.store(DX + at, narrow(dx * r, DX.dtype.element_ty), mask=real)
        if DWEIGHT is not None:
            dweight += dy * n
        if DBIAS is not None:
            dbias += dy
    of_program = tl.program_id(0).to(tl.int64) * C + columns
    if DWEIGHT is not None:
        tl.store(DWEIGHT + of_program, tl.sum(dweight, 0), mask=columns < C)
    if DBIAS is not None:
        tl.store(DBIAS + of_program, tl.sum(dbias, 0), mask=columns < C)


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(PARTS, OUT, parts, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """OUT (C,): the sums of the columns of PARTS (parts, C)."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, parts, ROWS):
        rows = start + tl.arange(0, ROWS)
        real = (rows < parts)[:, None] & (columns < C)[None, :]
        total += tl.load(PARTS + rows[:, None] * C + columns[None, :], mask=real, other=0.0)
    tl.store(OUT + columns, narrow(tl.sum(total, 0), OUT.dtype.element_ty), mask=columns < C)


@triton.jit(do_not_specialize=_VARIABLE)
def row_dropout_kernel(
    X, OUT, SEED, N, C, threshold: tl.uint32, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A tile of X (N, C). kept: the share that dropout keeps; threshold: the rest, times 2¹⁶."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    rows = first + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    real = (rows < N)[:, None] & (columns < C)[None, :]
    at = rows[:, None] * C + columns[None, :]
    high = (first >> 32).to(tl.int32)
    keep = keep_tile(tl.load(SEED), threshold, high, first.to(tl.int32), first_column, ROWS, COLUMNS)
    x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    tl.store(OUT + at, narrow(tl.where(keep, x * (1.0 / kept), 0.0), OUT.dtype.element_ty), mask=real)


# ------------------------------------------------------------------------------------------------------------- launches


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm of x (…, C) in `dtype`, and the statistics (2, rows). norm: a number of NORMS."""
    x, weight, bias = x.contiguous(), _contiguous(weight), _contiguous(bias)
    C, N = x.shape[-1], x.numel() // x.shape[-1]
    out, statistics = torch.empty_like(x, dtype=dtype), x.new_empty((2, N), dtype=torch.float32)
    with torch.cuda.device_of(x):
        tiles = _tiles(C)
        layer = NORMS[norm] == "layernorm"
        eps = LAYER_EPS if layer else RMS_EPS
        grid = (triton.cdiv(N, tiles["ROWS"]),)
        norm_kernel[grid](x, weight, bias, out, statistics, N, C, eps, layer, **tiles)
    return out, statistics


def norm_backward(
    dnormed: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, norm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, from the statistics of the forward; (0,) for what is None."""
    x, dnormed, weight = x.contiguous(), dnormed.contiguous(), _contiguous(weight)
    C, N = x.shape[-1], x.numel() // x.shape[-1]
    tiles = _tiles(C)
    share = triton.cdiv(triton.cdiv(N, SHARES), tiles["ROWS"]) * tiles["ROWS"]
    programs = triton.cdiv(N, share)
    dx = torch.empty_like(x)
    parts = [None if given is None else x.new_empty((programs, C), dtype=torch.float32) for given in (weight, bias)]
    with torch.cuda.device_of(x):
        layer = NORMS[norm] == "layernorm"
        norm_backward_kernel[(programs,)](
            dnormed, x, weight, statistics.contiguous(), dx, *parts, N, C, share, layer, **tiles
        )
        return dx, _added(parts[0], weight, x), _added(parts[1], bias, x)


def _added(parts: Tensor | None, like: Tensor | None, x: Tensor) -> Tensor:
    if parts is None or like is None:
        return x.new_empty(0)
    out = torch.empty_like(like)
    C = len(out)
    add_parts_kernel[(triton.cdiv(C, 32),)](parts, out, len(parts), C, ROWS=64, COLUMNS=32, num_warps=4)
    return out


def row_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout of x (…, C) by the numbers of its rows and channels."""
    x = x.contiguous()
    C, N = x.shape[-1], x.numel() // x.shape[-1]
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        columns = min(128, max(16, triton.next_power_of_2(C)))
        tiles = {"ROWS": VALUES // columns, "COLUMNS": columns, "num_warps": 4}
        grid = (triton.cdiv(N, tiles["ROWS"]), triton.cdiv(C, columns))
        seed = seed.to(x.device, non_blocking=True)
        row_dropout_kernel[grid](x, out, seed, N, C, int(p * 2**16), 1 - p, **tiles)
    return out


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _tiles(C: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(C))
    return {"ROWS": max(1, VALUES // block), "BLOCK_C": block, "num_warps": max(4, min(16, block // 512))}
