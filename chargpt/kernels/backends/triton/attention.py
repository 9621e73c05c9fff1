"""Causal attention, forward and backward, in Triton.

FlashAttention-2 (Dao 2023, algorithms 1 and 2), one program for each tile of the output:
  forward   Q stays; for each tile of keys S = scale · Q Kᵀ, running row maxima m and sums l, P = exp(S − m),
            O ← O · exp(m_old − m) + P V; at the end O / l and lse = m + log l
  backward  δ = rowsum(dO ∘ O); then P = exp(S − lse) again, dP = dO Vᵀ, dS = P ∘ (dP − δ + dlse), in two kernels: K
            and V stay while dV += Pᵀ dO and dK += dSᵀ Q; Q and dO stay while dQ += dS K
  causality Only tiles that some query of the tile sees are visited, and only those on the diagonal are masked. (With a
            window all are, and those of dK and dV under dropout: another loop costs registers that spill.)
Nothing is added up by two programs, so there are no atomics and every bit is the same in every run; for that S and dP
are computed twice in the backward, 7 products for each tile instead of 5.

Memory per program: the tile that stays and its float32 accumulator, (BLOCK, D) each, and the tile of S in registers;
in shared memory the operands of the products, and `num_stages` tiles of the two operands that stream past. With
D = 64, bfloat16, 128 x 64: Q 16 KiB, and K and V 2 x 8 KiB per stage, 64 KiB for 3 stages, so three programs fit
beside each other in the 227 KiB of a Hopper processor.

In kernels Q, K, V … are pointers and q, k, v … tiles. A tensor's strides are (batch, head, time, channel), in elements.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: E741 - l and O are the paper's letters
# mypy: disable-error-code="no-any-return"

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from chargpt.kernels.backends.triton.numerics import dot, exp_of_scores, narrow, rounded_product
from chargpt.kernels.backends.triton.philox import keep_tile
from chargpt.kernels.philox import UNIT

MAX_HEAD_SIZE = 256
# Values that change from call to call, or say nothing about alignment: one compilation serves them all.
_VARIABLE = ["H", "T", "S", "window", "threshold"]


# --------------------------------------------------------------------------------------------------------------- tiles


@triton.jit
def head_of(base, strides, batch, head):
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def tile_addresses(base, strides, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of rows `first` … of one head: (ROWS, COLUMNS). The offset of the tile has 64 bits, those inside it 32."""
    rows, channels = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return base + tl.cast(first, tl.int64) * strides[2] + rows[:, None] * strides[2] + channels[None, :] * strides[3]


@triton.jit
def load_tile(
    base, strides, first, end, CHECK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows first … first + ROWS of one head. Zeros beyond the D channels, and, if CHECK, in rows from `end` on."""
    addresses = tile_addresses(base, strides, first, ROWS, COLUMNS)
    here = first + tl.arange(0, ROWS)[:, None] < end
    real = tl.arange(0, COLUMNS)[None, :] < D
    if CHECK and D < COLUMNS:
        tile = tl.load(addresses, mask=here & real, other=0.0)
    elif CHECK:
        tile = tl.load(addresses, mask=here, other=0.0)
    elif D < COLUMNS:
        tile = tl.load(addresses, mask=real, other=0.0)
    else:
        tile = tl.load(addresses)
    return tile


@triton.jit
def store_tile(base, strides, first, end, tile, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    here = first + tl.arange(0, ROWS)[:, None] < end
    real = tl.arange(0, COLUMNS)[None, :] < D
    addresses = tile_addresses(base, strides, first, ROWS, COLUMNS)
    tl.store(addresses, narrow(tile, base.dtype.element_ty), mask=here & real)


@triton.jit
def visible(position, key, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N): which queries from an absolute position on may look at which keys from another one on."""
    queries = position + tl.arange(0, BLOCK_M)[:, None]
    keys = key + tl.arange(0, BLOCK_N)[None, :]
    seen = keys <= queries
    if WINDOWED:
        seen &= keys > queries - window
    return seen


@triton.jit
def key_bounds(first, T, S, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that the queries first … first + BLOCK_M see: whole tiles that all these queries see [0, 1), tiles where
    positions are compared [1, 2), the diagonal or, with a window, all. Bounds but the last are multiples of BLOCK_N."""
    position = S - T + first
    end = tl.minimum(position + BLOCK_M, S)
    if WINDOWED:
        begin = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
        whole = begin
    else:
        begin = 0
        whole = (position + 1) // BLOCK_N * BLOCK_N
    return begin, whole, end


@triton.jit
def query_bounds(first, T, S, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The queries that see the keys first … first + BLOCK_N: tiles where positions are compared [0, 1), as above, and
    whole tiles that see all these keys [1, 2). All bounds but the last are multiples of BLOCK_M, or T."""
    index = first - (S - T)  # of the query at the position of the first key
    begin = tl.maximum(index, 0) // BLOCK_M * BLOCK_M
    if WINDOWED:
        end = tl.minimum(tl.maximum(index + BLOCK_N - 1 + window, 0), T)
        edge = end
    else:
        end = T
        edge = tl.minimum(tl.cdiv(tl.maximum(index + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M, T)
    return begin, edge, end


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=_VARIABLE)
def forward_kernel(
    Q, K, V, O, LSE,
    q_strides, k_strides, v_strides, o_strides,
    H, T, S, window, scale, kept, SEED, threshold: tl.uint32,
    SIGN: tl.constexpr, GROUP: tl.constexpr, WINDOWED: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O and lse for BLOCK_M queries of one head.

    The programs of one head are neighbours, so its K and V are in the L2 cache; the longest rows come first.
    SIGN: of the scale; `scale` is its size. sign · q is exact, and makes the largest product the largest score, so the
        maximum is taken of the products, and a score's distance to it is one multiply-add.
    kept: the share of the weights that dropout keeps; SEED: where its seed is
    """
    if DROPOUT:
        seed = tl.load(SEED)
    tiles = tl.cdiv(T, BLOCK_M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch_head = tl.program_id(0) // tiles
    batch, h = batch_head // H, batch_head % H
    K, V = head_of(K, k_strides, batch, h // GROUP), head_of(V, v_strides, batch, h // GROUP)
    q = load_tile(head_of(Q, q_strides, batch, h), q_strides, first, T, True, D, BLOCK_M, BLOCK_D)
    if SIGN != 1:
        q = narrow(q.to(tl.float32) * SIGN, q.dtype)

    position = S - T + first
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the products q · k, before the scale
    l = tl.zeros((BLOCK_M,), tl.float32)
    bounds = key_bounds(first, T, S, window, WINDOWED, BLOCK_M, BLOCK_N)
    for part in tl.static_range(1 if WINDOWED else 0, 2):
        for start in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            k = load_tile(K, k_strides, start, S, part == 1, D, BLOCK_N, BLOCK_D)
            s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            if part == 1:
                s = tl.where(visible(position, start, window, WINDOWED, BLOCK_M, BLOCK_N), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = rounded_product(m_new, scale)
            if WINDOWED:  # a query may see nothing of this tile, nor of those before
                shift = tl.where(m_new == float("-inf"), 0.0, shift)
            p = exp_of_scores(s, scale, shift[:, None], q.dtype)
            alpha = tl.exp(rounded_product(m, scale) - shift)
            l = l * alpha + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(keep_tile(seed, threshold, batch_head, position, start, BLOCK_M, BLOCK_N), p, 0.0)
            v = load_tile(V, v_strides, start, S, part == 1, D, BLOCK_N, BLOCK_D)
            acc = dot(narrow(p, v.dtype), v, acc * alpha[:, None])
            m = m_new

    rows = first + tl.arange(0, BLOCK_M)
    lse = rounded_product(m, scale) + tl.log(l)
    tl.store(LSE + batch_head.to(tl.int64) * T + rows, lse, mask=rows < T)
    store_tile(head_of(O, o_strides, batch, h), o_strides, first, T, acc / (l * kept)[:, None], D, BLOCK_M, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=_VARIABLE)
def delta_kernel(
    dO, O, DELTA, do_strides, o_strides, H, T, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """δ = rowsum(dO ∘ O) for BLOCK_M queries of one head.

    In float32 it is the diagonal of dO Oᵀ, added up in the order of dP = dO Vᵀ, so that dP − δ cancels as well as it
    can: for a query that sees one key it is exactly 0. (For 16 rows that is 16 · D products for each, of about
    7 · D · T / 2 in the whole backward.)
    """
    tiles = tl.cdiv(T, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    batch_head = tl.program_id(0) // tiles
    batch, h = batch_head // H, batch_head % H
    do = load_tile(head_of(dO, do_strides, batch, h), do_strides, first, T, True, D, BLOCK_M, BLOCK_D)
    o = load_tile(head_of(O, o_strides, batch, h), o_strides, first, T, True, D, BLOCK_M, BLOCK_D)
    rows = first + tl.arange(0, BLOCK_M)
    if do.dtype == tl.float32:
        products = dot(do, tl.trans(o), tl.zeros((BLOCK_M, BLOCK_M), tl.float32))
        delta = tl.sum(tl.where(rows[:, None] == rows[None, :], products, 0.0), 1)
    else:
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + batch_head.to(tl.int64) * T + rows, delta, mask=rows < T)


@triton.jit
def load_rows(LSE, DELTA, dLSE, kept, batch_head, first, T, ROWS: tl.constexpr):
    """lse, kept · δ and kept · dlse of ROWS queries of one head. A row beyond the last has lse = ∞, so P = 0."""
    rows = first + tl.arange(0, ROWS)
    at = batch_head.to(tl.int64) * T + rows
    lse = tl.load(LSE + at, mask=rows < T, other=float("inf"))
    delta = tl.load(DELTA + at, mask=rows < T, other=0.0)
    dlse = tl.zeros((ROWS,), tl.float32)
    if dLSE is not None:
        dlse = tl.load(dLSE + at, mask=rows < T, other=0.0)
    return lse, delta * kept, dlse * kept


@triton.jit(do_not_specialize=_VARIABLE)
def key_gradients_kernel(
    Q, K, V, dO, dK, dV, LSE, DELTA, dLSE,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    H, T, S, window, scale, kept, SEED, threshold: tl.uint32,
    GROUP: tl.constexpr, WINDOWED: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV for BLOCK_N keys of one key head, over the queries of the GROUP query heads that read it.

    Tiles of S and dP are transposed here, (BLOCK_N, BLOCK_M): as such they are left operands without being moved, and
    BLOCK_N, at least 64, is the side that `wgmma` wants 64 of.
    With dropout dS = P ∘ (keep ∘ dP / kept − δ + dlse): the division waits for the end.
    """
    if DROPOUT:
        seed = tl.load(SEED)
    tiles = tl.cdiv(S, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N  # the first keys are seen by the most queries
    batch, h_kv = tl.program_id(0) // tiles // (H // GROUP), tl.program_id(0) // tiles % (H // GROUP)
    k = load_tile(head_of(K, k_strides, batch, h_kv), k_strides, first, S, True, D, BLOCK_N, BLOCK_D)
    v = load_tile(head_of(V, v_strides, batch, h_kv), v_strides, first, S, True, D, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    bounds = query_bounds(first, T, S, window, WINDOWED, BLOCK_M, BLOCK_N)
    ALL_COMPARED: tl.constexpr = WINDOWED or DROPOUT
    for member in range(GROUP):
        h = h_kv * GROUP + member
        batch_head = batch * H + h
        Q_h, dO_h = head_of(Q, q_strides, batch, h), head_of(dO, do_strides, batch, h)
        for part in tl.static_range(0, 1 if ALL_COMPARED else 2):
            for start in tl.range(bounds[part], bounds[2 if ALL_COMPARED else part + 1], BLOCK_M):
                q = load_tile(Q_h, q_strides, start, T, True, D, BLOCK_M, BLOCK_D)
                do = load_tile(dO_h, do_strides, start, T, True, D, BLOCK_M, BLOCK_D)
                lse, delta, dlse = load_rows(LSE, DELTA, dLSE, kept, batch_head, start, T, BLOCK_M)
                s = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
                p = exp_of_scores(s, scale, lse[None, :], q.dtype)
                if part == 0:
                    seen = visible(S - T + start, first, window, WINDOWED, BLOCK_M, BLOCK_N)
                    p = tl.where(tl.trans(seen), p, 0.0)
                dp = dot(v, tl.trans(do), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
                dropped = p
                if DROPOUT:
                    keep = tl.trans(keep_tile(seed, threshold, batch_head, S - T + start, first, BLOCK_M, BLOCK_N))
                    dropped = tl.where(keep, p, 0.0)
                    dp = tl.where(keep, dp, 0.0)
                dv = dot(narrow(dropped, do.dtype), do, dv)
                ds = p * (dp - delta[None, :] + dlse[None, :])
                dk = dot(narrow(ds, q.dtype), q, dk)
    store_tile(head_of(dK, dk_strides, batch, h_kv), dk_strides, first, S, dk * (scale / kept), D, BLOCK_N, BLOCK_D)
    store_tile(head_of(dV, dv_strides, batch, h_kv), dv_strides, first, S, dv / kept, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=_VARIABLE)
def query_gradients_kernel(
    Q, K, V, dO, dQ, LSE, DELTA, dLSE,
    q_strides, k_strides, v_strides, do_strides, dq_strides,
    H, T, S, window, scale, kept, SEED, threshold: tl.uint32,
    GROUP: tl.constexpr, WINDOWED: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ for BLOCK_M queries of one head, tiled and ordered as in the forward."""
    if DROPOUT:
        seed = tl.load(SEED)
    tiles = tl.cdiv(T, BLOCK_M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch_head = tl.program_id(0) // tiles
    batch, h = batch_head // H, batch_head % H
    K, V = head_of(K, k_strides, batch, h // GROUP), head_of(V, v_strides, batch, h // GROUP)
    q = load_tile(head_of(Q, q_strides, batch, h), q_strides, first, T, True, D, BLOCK_M, BLOCK_D)
    do = load_tile(head_of(dO, do_strides, batch, h), do_strides, first, T, True, D, BLOCK_M, BLOCK_D)
    lse, delta, dlse = load_rows(LSE, DELTA, dLSE, kept, batch_head, first, T, BLOCK_M)

    position = S - T + first
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bounds = key_bounds(first, T, S, window, WINDOWED, BLOCK_M, BLOCK_N)
    for part in tl.static_range(1 if WINDOWED else 0, 2):
        for start in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            k = load_tile(K, k_strides, start, S, part == 1, D, BLOCK_N, BLOCK_D)
            v = load_tile(V, v_strides, start, S, part == 1, D, BLOCK_N, BLOCK_D)
            s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            p = exp_of_scores(s, scale, lse[:, None], q.dtype)
            if part == 1:
                p = tl.where(visible(position, start, window, WINDOWED, BLOCK_M, BLOCK_N), p, 0.0)
            dp = dot(do, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            if DROPOUT:
                keep = keep_tile(seed, threshold, batch_head, position, start, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp, 0.0)
            ds = p * (dp - delta[:, None] + dlse[:, None])
            dq = dot(narrow(ds, k.dtype), k, dq)
    store_tile(head_of(dQ, dq_strides, batch, h), dq_strides, first, T, dq * (scale / kept), D, BLOCK_M, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------ launches


def causal_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout_p: float,
    window: int | None,
    seed: Tensor | None,
    *,
    tiles: Config | None = None,
    autotune: bool = False,
) -> tuple[Tensor, Tensor]:
    """O (B, H, T, D) over (B, T, H, D) memory, and lse (B, H, T) in float32; arguments as `reference.causal_attention`.

    tiles: BLOCK_M and BLOCK_N with their warps and stages; None: the table's
    autotune: instead time a short list of tiles, once for each kind of call
    """
    B, H, T, _ = q.shape
    out, lse = _empty_by_time(q), q.new_empty((B, H, T), dtype=torch.float32)
    options = _options(q, k, dropout_p, window, seed)
    with torch.cuda.device_of(q):
        _launch(
            forward_kernel,
            (B * H, T, "BLOCK_M"),
            _fit(tiles or _default("forward", q, options), T, k.shape[2]),
            autotune,
            (q, k, v, out, lse, *(x.stride() for x in (q, k, v, out))),
            {**options, "scale": abs(scale) or 1.0, "SIGN": (scale > 0) - (scale < 0)},
        )
    return out, lse


def causal_attention_backward(
    out_gradient: Tensor | None,
    lse_gradient: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    window: int | None,
    seed: Tensor | None,
    **tiles: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, each over (batch, time, head, channel) memory. None as a gradient is zero."""
    gradients = _empty_by_time(q), _empty_by_time(k), _empty_by_time(v)
    do = out.new_zeros(()).expand_as(out) if out_gradient is None else out_gradient
    causal_attention_backward_into(
        *gradients, do, q, k, v, out, lse, scale, dropout_p, window, seed, lse_gradient=lse_gradient, **tiles
    )
    return gradients


def causal_attention_backward_into(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    window: int | None,
    seed: Tensor | None,
    *,
    lse_gradient: Tensor | None = None,
    key_tiles: Config | None = None,
    query_tiles: Config | None = None,
    autotune: bool = False,
) -> None:
    """Writes dQ, dK and dV to memory of any strides."""
    (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
    dlse = None if lse_gradient is None else lse_gradient.contiguous()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    options = _options(q, k, dropout_p, window, seed) | {"scale": scale}
    with torch.cuda.device_of(q):
        if delta.numel() > 0:
            grid = (B * H * triton.cdiv(T, 16),)
            delta_kernel[grid](
                do, out, delta, do.stride(), out.stride(), H, T, D=D, BLOCK_D=options["BLOCK_D"], BLOCK_M=16
            )
        _launch(
            key_gradients_kernel,
            (B * H_kv, S, "BLOCK_N"),
            _fit(key_tiles or _default("key_gradients", q, options), T, S),
            autotune,
            (q, k, v, do, dk, dv, lse, delta, dlse, *(x.stride() for x in (q, k, v, do, dk, dv))),
            options,
        )
        _launch(
            query_gradients_kernel,
            (B * H, T, "BLOCK_M"),
            _fit(query_tiles or _default("query_gradients", q, options), T, S),
            autotune,
            (q, k, v, do, dq, lse, delta, dlse, *(x.stride() for x in (q, k, v, do, dq))),
            options,
        )


def _empty_by_time(x: Tensor) -> Tensor:
    """As x (B, H, T, D), over (B, T, H, D) memory."""
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def _options(q: Tensor, k: Tensor, dropout_p: float, window: int | None, seed: Tensor | None) -> dict[str, Any]:
    """What all kernels but delta's take by name."""
    (H, T, D), (H_kv, S) = q.shape[1:], k.shape[1:3]
    if D > MAX_HEAD_SIZE:
        raise ValueError(f"the Triton kernels take heads of at most {MAX_HEAD_SIZE} channels, got {D}")
    windowed = window is not None and window < S
    return {
        "H": H,
        "T": T,
        "S": S,
        "window": window if windowed else 0,
        "kept": 1.0 if seed is None else 1 - dropout_p,
        "SEED": None if seed is None else seed.to(q.device, non_blocking=True),
        "threshold": int(dropout_p * UNIT),
        "GROUP": H // H_kv,
        "WINDOWED": windowed,
        "DROPOUT": seed is not None,
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),  # 16 is the least that tl.dot takes
    }


def _launch(
    kernel: Any, work: tuple[int, int, str], tiles: Config, autotune: bool, tensors: tuple[Any, ...], options: Any
) -> None:
    """work: (heads, rows of each, the name of the block size that divides the rows among programs)"""
    heads, rows, block = work
    if heads * rows == 0:
        return
    grid = lambda meta: (heads * triton.cdiv(rows, meta[block]),)  # noqa: E731
    if autotune:
        _autotuned(kernel)[grid](*tensors, **options)
    else:
        kernel[grid](*tensors, **options, **tiles.all_kwargs())


@functools.cache
def _autotuned(kernel: Any) -> Any:
    """Made on demand: an autotuner needs a GPU."""
    return triton.autotune(CANDIDATES[kernel], key=["T", "S", "D", "GROUP", "WINDOWED", "DROPOUT"])(kernel)


def _tiles(block_m: int, block_n: int, num_warps: int, num_stages: int, maxnreg: int | None = None) -> Config:
    """maxnreg: registers of a thread. Left to itself, ptxas rather spills a few than take more than 128."""
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


def _fit(tiles: Config, T: int, S: int) -> Config:
    """Smaller tiles for a short sequence, but not below 64 rows, which fill the tensor cores. Half the queries take
    half the warps, so that a warp's registers hold what they did."""
    sizes = {"BLOCK_M": T, "BLOCK_N": S}
    blocks = {name: min(size, max(64, triton.next_power_of_2(sizes[name]))) for name, size in tiles.kwargs.items()}
    num_warps = tiles.num_warps * blocks["BLOCK_M"] // tiles.kwargs["BLOCK_M"]
    return Config(blocks, num_warps=num_warps, num_stages=tiles.num_stages, maxnreg=tiles.maxnreg)


def _default(kernel: str, q: Tensor, options: dict[str, Any]) -> Config:
    """The table's tiles. The random words of dropout, and a window's comparisons in every tile, take the registers that
    half as many channels more would. Heads that are no multiple of 16 bytes, whose elements are loaded one by one, each
    by its own address, take the smallest tiles."""
    table = TILES[kernel, q.element_size()]
    if options["D"] * q.element_size() % 16 != 0:
        return table[-1][1]
    size = options["BLOCK_D"] * (1.5 if options["DROPOUT"] or options["WINDOWED"] else 1)
    return next(tiles for largest, tiles in table if size <= largest)


# By kernel and bytes of an element: (largest D, tiles). Reasoned, not measured on a GPU: large tiles that compile
# without spilling a register for sm_80 and sm_90, and, for 16 bits and up to 128 channels, to `wgmma` on sm_90, which
# wants 64 rows of S: queries, or the keys of dK and dV. What larger ones spilled for them, in bytes, with Triton 3.6:
#   forward        128 x 64, D = 128 with a window: 8 (sm_80), 24 with 2 stages
#   key_gradients  D = 64: 32 x 64 and 32 x 128: 48 and 0 (sm_80, sm_90); D = 128: 32 x 64: 0 and 16, 32 x 128: 312 and
#                  48, 64 x 64: 48 and 688, 16 x 64 with 4 warps: 40 and 104; with dropout 16 x 128: 32 and 0
#   float32        is multiplied outside the tensor cores, from registers, and takes smaller ones; left to choose the
#                  number of registers, ptxas spilled 8 to 32 bytes. Forward, D = 256 with dropout, 8 warps: 8
TILES = {
    ("forward", 2): [(128, _tiles(128, 64, 8, 3)), (384, _tiles(64, 32, 8, 2))],
    ("key_gradients", 2): [(128, _tiles(16, 128, 8, 2)), (192, _tiles(16, 64, 8, 2)), (384, _tiles(32, 32, 8, 1))],
    ("query_gradients", 2): [(64, _tiles(64, 32, 4, 2)), (192, _tiles(64, 32, 8, 2)), (384, _tiles(32, 32, 8, 1))],
    ("forward", 4): [(64, _tiles(32, 32, 8, 1, 255)), (256, _tiles(16, 16, 8, 1, 255)), (384, _tiles(16, 16, 16, 1))],
    ("key_gradients", 4): [(64, _tiles(16, 32, 8, 1, 255)), (384, _tiles(16, 16, 8, 1, 255))],
    ("query_gradients", 4): [(64, _tiles(32, 16, 8, 1, 255)), (384, _tiles(16, 16, 8, 1, 255))],
}
CANDIDATES = {
    forward_kernel: [_tiles(128, 64, 8, 3), _tiles(128, 64, 4, 3), _tiles(128, 128, 8, 2), _tiles(64, 64, 4, 3),
                     _tiles(64, 32, 4, 3), _tiles(32, 32, 4, 2), _tiles(16, 16, 4, 1)],
    key_gradients_kernel: [_tiles(16, 128, 8, 2), _tiles(32, 128, 8, 2), _tiles(32, 64, 8, 2), _tiles(32, 64, 4, 2),
                           _tiles(16, 64, 8, 2), _tiles(32, 32, 8, 1), _tiles(16, 16, 8, 1, 255)],
    query_gradients_kernel: [_tiles(64, 32, 4, 2), _tiles(64, 64, 4, 2), _tiles(128, 64, 8, 2), _tiles(64, 32, 8, 2),
                             _tiles(32, 32, 8, 1), _tiles(32, 16, 8, 1), _tiles(16, 16, 8, 1)],
}  # fmt: skip
