"""Heads from the packed projection, normalised and rotated: the public function, its reference, and its operators.

In C++ attention writes the gradients of q, k and v side by side, in the order of the projection. Where heads were only
split, that is the projection's gradient, and nothing is copied.

torch.compile and torch.func get the reference, which they can look into.
"""

from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.add_norm import rms_norm
from chargpt.kernels.ops.common import (
    Operation,
    OperatorLibrary,
    computing_dtype,
    only_reference,
    second_derivative,
    shape_of,
)

OPTIONS = "Tensor? cos, Tensor? sin, int n_head, int n_kv_head, bool qk_norm"


def qkv_heads(
    qkv: Tensor,
    value_rows: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    n_head: int,
    n_kv_head: int,
    qk_norm: bool,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for `causal_attention` from the packed projection, normalised and rotated in one pass.

    qkv: (B, T, (H + 2 H_kv) D), floating: the heads of q, then of k, then of v; any strides
    value_rows: (B, T, H_kv D), floating: added to v
    cos, sin: (T', D/2) in float32 with T' ≥ T: position t turns channels i and i + D/2 of each head of q and k by the
        angle of row t (Su et al. 2021, arXiv 2104.09864, equation 34). They get no gradient. None: no rotation
    n_head, n_kv_head: H and H_kv
    qk_norm: divide each head of q and k by sqrt(mean over D of its squares + 10⁻⁶), before it is rotated
    impl: "auto", or the name of an implementation; "cuda" and "triton" have no such kernel and mean the reference
    returns: q (B, H, T, D), k and v (B, H_kv, T, D), in the dtype of qkv, computed in float32 (float64 for float64)
        and rounded once. They may share memory with qkv, so do not write into them.

    Raises ValueError for tensors that do not fit together, ConfigError when `impl` cannot run.
    """
    _check(qkv, value_rows, cos, sin, n_head, n_kv_head)
    chosen = registry.function("qkv_heads", qkv.device.type, qkv.dtype, impl)
    return chosen(  # type: ignore[no-any-return]
        qkv, value_rows, cos, sin, n_head=n_head, n_kv_head=n_kv_head, qk_norm=qk_norm
    )


def check_packed(qkv: Tensor, n_head: int, n_kv_head: int) -> None:
    """Raise ValueError where qkv is not a packed projection of so many heads."""
    if n_head < 1 or n_kv_head < 1:
        raise ValueError(f"n_head and n_kv_head must be at least 1, got {n_head} and {n_kv_head}")
    heads = n_head + 2 * n_kv_head
    if qkv.dim() != 3 or qkv.shape[2] == 0 or qkv.shape[2] % heads:
        raise ValueError(f"qkv must be (B, T, {heads} D) with D at least 1, got {shape_of(qkv)}")
    if not qkv.dtype.is_floating_point:
        raise ValueError(f"qkv must have a floating dtype, got {qkv.dtype}")


def _check(
    qkv: Tensor, value_rows: Tensor | None, cos: Tensor | None, sin: Tensor | None, n_head: int, n_kv_head: int
) -> None:
    check_packed(qkv, n_head, n_kv_head)
    B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // (n_head + 2 * n_kv_head)
    if value_rows is not None:
        if value_rows.shape != (B, T, n_kv_head * D) or not value_rows.dtype.is_floating_point:
            raise ValueError(
                f"value_rows must be floating {(B, T, n_kv_head * D)} beside qkv {shape_of(qkv)}, "
                f"got {value_rows.dtype} {shape_of(value_rows)}"
            )
        if value_rows.device != qkv.device:
            raise ValueError(f"qkv and value_rows must be on one device, got {qkv.device} and {value_rows.device}")
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("cos and sin must be given together")
    if D % 2 or cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] < T or cos.shape[1] != D // 2:
        raise ValueError(
            f"cos and sin must be (at least {T}, D/2) with D={D} even, got {shape_of(cos)} and {shape_of(sin)}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or not cos.device == sin.device == qkv.device:
        raise ValueError(
            f"cos and sin must be float32 on the device of qkv, {qkv.device}, "
            f"got {cos.dtype} on {cos.device} and {sin.dtype} on {sin.device}"
        )


# ------------------------------------------------------------------------------------------------------------ reference


def reference(
    qkv: Tensor,
    value_rows: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    n_head: int,
    n_kv_head: int,
    qk_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of a packed projection: q and k normalised and rotated, v with rows added. See `chargpt.kernels`.

    qkv: (B, T, (H + 2 H_kv) D); value_rows: (B, T, H_kv D); cos, sin: (T', D/2)
    returns: q (B, H, T, D), k and v (B, H_kv, T, D) in the dtype of qkv, rounded once
    """
    dtype = computing_dtype(qkv)
    with torch.autocast(qkv.device.type, enabled=False):
        B, T, channels = qkv.shape
        D = channels // (n_head + 2 * n_kv_head)
        heads = qkv.view(B, T, n_head + 2 * n_kv_head, D)
        if not qk_norm and cos is None:  # split once, so that the gradients are joined once, in the memory of qkv
            q, k, v = heads.split([n_head, n_kv_head, n_kv_head], dim=2)  # type: ignore[no-untyped-call]
        else:
            qk, v = heads.split([n_head + n_kv_head, n_kv_head], dim=2)  # type: ignore[no-untyped-call]
            qk = qk.to(dtype)
            if qk_norm:
                qk = rms_norm(qk)
            if cos is not None and sin is not None:
                qk = _rotate(qk, cos[:T, None].detach().to(dtype), sin[:T, None].detach().to(dtype))
            q, k = qk.to(qkv.dtype).split([n_head, n_kv_head], dim=2)
        if value_rows is not None:
            v = (v + value_rows.view(B, T, n_kv_head, D)).to(qkv.dtype)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + D/2 turned by the angle of their position. Su et al. 2021, arXiv 2104.09864, equation 34."""
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# ------------------------------------------------------------------------------------------------------------ operators


def register(library: OperatorLibrary) -> Any:
    """Operators over the kernels

    - `qkv_heads_forward(qkv, value_rows?, cos?, sin?, n_head, n_kv_head, qk_norm) -> q, k, v`, in memory of their own,
    - `qkv_heads_backward(dq?, dk?, dv?, qkv?, cos?, sin?, n_head, n_kv_head, qk_norm) -> dqkv`; qkv comes with a norm.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        qkv, value_rows, cos, sin, *ctx.options = inputs
        ctx.value_dtype = None if value_rows is None else value_rows.dtype
        ctx.save_for_backward(qkv if ctx.options[-1] else None, cos, sin)

    def differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        dqkv = library.ops.qkv_heads_backward(dq, dk, dv, *ctx.saved_tensors, *ctx.options)
        rows = None if ctx.value_dtype is None else dv.transpose(1, 2).flatten(2).to(ctx.value_dtype)
        return dqkv, rows, *[None] * 5

    def fake(qkv: Tensor, _: Any, __: Any, ___: Any, H: int, H_kv: int, ____: bool) -> tuple[Tensor, ...]:
        B, T, channels = qkv.shape
        D = channels // (H + 2 * H_kv)
        return tuple(qkv.new_empty((B, T, heads, D)).transpose(1, 2) for heads in (H, H_kv, H_kv))

    def fake_backward(*arguments: Any) -> Tensor:
        dq, dk, dv, *_, H, H_kv, __ = arguments
        given: Tensor = next(x for x in (dq, dk, dv) if x is not None)
        B, _, T, D = given.shape
        return given.new_empty((B, T, (H + 2 * H_kv) * D))

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, H, H_kv, norm = inputs
        ctx.options = {"n_head": H, "n_kv_head": H_kv, "qk_norm": norm}
        ctx.dqkv = output.shape, output.dtype, output.device
        ctx.save_for_backward(*tensors)

    def differentiate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, qkv, cos, sin = ctx.saved_tensors
        shape, dtype, device = ctx.dqkv
        x = torch.zeros(shape, dtype=dtype, device=device) if qkv is None else qkv  # without a norm its value is moot
        H, H_kv = ctx.options["n_head"], ctx.options["n_kv_head"]
        D = shape[2] // (H + 2 * H_kv)
        full = tuple(
            x.new_zeros((shape[0], heads, shape[1], D)) if given is None else given
            for heads, given in zip((H, H_kv, H_kv), gradients, strict=True)
        )
        dfull, dx = second_derivative(lambda x: reference(x, None, cos, sin, **ctx.options), full, x, upstream)
        again = [None if given is None else d for given, d in zip(gradients, dfull, strict=True)]
        return *again, None if qkv is None else dx, *[None] * 5

    library.define(
        "qkv_heads",
        f"(Tensor qkv, Tensor? value_rows, {OPTIONS}) -> (Tensor q, Tensor k, Tensor v)",
        lambda *arguments: library.kernels().qkv_heads_forward(*arguments),
        fake,
        (save, differentiate),
    )
    library.define(
        "qkv_heads_backward",
        f"(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? qkv, {OPTIONS}) -> Tensor",
        lambda *arguments: library.kernels().qkv_heads_backward(*arguments),
        fake_backward,
        (save_for_backward, differentiate_backward),
    )

    def split(
        qkv: Tensor,
        value_rows: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        n_head: int,
        n_kv_head: int,
        qk_norm: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `reference`."""
        if only_reference(qkv, value_rows, cos, sin):
            return reference(qkv, value_rows, cos, sin, n_head=n_head, n_kv_head=n_kv_head, qk_norm=qk_norm)
        return library.ops.qkv_heads(qkv, value_rows, cos, sin, n_head, n_kv_head, qk_norm)  # type: ignore[no-any-return]

    return split


OPERATION = Operation("qkv_heads", reference, register, small=True)
