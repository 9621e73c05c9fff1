"""Causal attention: the public function, its reference, and the operators that a backend's kernels become.

Dropout's seed lies on the device of q, where kernels read it, so a CUDA graph drops other weights at every replay. A
seed on the CPU becomes an argument of the launch, which a graph would repeat: while one is captured it is refused.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Generator, Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.common import Operation, OperatorLibrary, computing_dtype, only_reference, shape_of
from chargpt.kernels.philox import UNIT, dropout_keep_mask, refuse_capture

MAX_HEAD_SIZE = 256  # the largest D that the kernels take: kMaxHeadSize in csrc/
NAMES = ("scale", "dropout_p", "window", "seed")
OPTIONS = "float scale, float dropout_p, int? window, Tensor? seed"


@overload
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    dropout_p: float = ...,
    window: int | None = ...,
    generator: Generator | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...
@overload
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    dropout_p: float = ...,
    window: int | None = ...,
    generator: Generator | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
    generator: Generator | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal scaled dot-product attention (Vaswani et al. 2017, equation 1), with grouped key and value heads.

    q: (B, H, T, D), floating; any strides
    k, v: (B, H_kv, S, D), H a multiple of H_kv: query head h reads key and value head h // (H / H_kv); S ≥ T ≥ 0.
        Queries and keys are aligned at the end: query i sees the keys up to S − T + i.
    scale: factor on q·k; None: 1 / √D
    dropout_p: probability in [0, 1) that an attention weight is dropped, after the softmax, rounded down to a multiple
        of 2⁻¹⁶; the others grow by 1 / (1 − p)
    window: each query sees only the last `window` of its keys, itself included; None: all
    generator: what dropout draws its 64-bit seed from, a generator of q's device or of the CPU; None: the default one
        of q's device. The mask is a function of that seed and of positions alone (`philox.dropout_keep_mask`), so it is
        the same on every device and in every implementation. Nothing is drawn when dropout_p is 0.
    return_lse: also return, for each query, the natural logarithm of Σ exp(scaled scores), before dropout
    impl: "auto", or the name of an implementation
    returns: O (B, H, T, D) in the dtype of q; with return_lse also lse (B, H, T) in float32, or float64 for float64

    bfloat16, float16 and float32 are accumulated in float32, inside autocast regions too. There q, k and v may have
    different dtypes (a normalised q beside a v from a linear layer): then all three are cast to the region's dtype.

    Raises ValueError for tensors that do not fit together, ConfigError when `impl` cannot run, RuntimeError when a CUDA
    graph would capture dropout, in either pass, with a seed from a CPU generator: replays would repeat one mask.
    """
    if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check(q, k, v, dropout_p, window)
    dropout_p, seed = drawn_seed(dropout_p, generator, q.device)
    chosen = registry.function("causal_attention", q.device.type, q.dtype, impl)
    return chosen(  # type: ignore[no-any-return]
        q,
        k,
        v,
        scale=usual_scale(q) if scale is None else scale,
        dropout_p=dropout_p,
        window=window,
        seed=seed,
        return_lse=return_lse,
    )


def check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, window: int | None) -> None:
    """Raise ValueError for what does not fit together, as `causal_attention` says."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q must be (B, H, T, D) and k (B, H_kv, S, D), got {shape_of(q)} and {shape_of(k)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got k {shape_of(k)} and v {shape_of(v)}")
    B, H, T, D = q.shape
    B_k, H_kv, S, D_k = k.shape
    if B_k != B or D_k != D or D == 0:
        raise ValueError(f"q and k must agree in B and D, and D be at least 1, got q {shape_of(q)} and k {shape_of(k)}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {H} and {H_kv}")
    if S < T:
        raise ValueError(f"k must have at least as many positions as q, got S={S} and T={T}")
    if not q.dtype.is_floating_point or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")


def drawn_seed(dropout_p: float, generator: Generator | None, device: torch.device) -> tuple[float, Tensor | None]:
    """(dropout_p as the kernels know it, the seed of its mask), as `causal_attention` says."""
    if generator is not None and generator.device not in (torch.device("cpu"), device):
        raise ValueError(f"the generator must be of the CPU or of {device}, got one of {generator.device}")
    dropout_p = math.floor(dropout_p * UNIT) / UNIT
    if dropout_p == 0:
        return dropout_p, None
    where = device if generator is None else generator.device
    return dropout_p, torch.randint(2**63 - 1, (), generator=generator, device=where)


def usual_scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


# ------------------------------------------------------------------------------------------------------------ reference


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    dropout_p: float,
    window: int | None,
    seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · Q Kᵀ, causally masked), dropped out, times V. Vaswani et al. 2017, equation 1.

    q: (B, H, T, D); k, v: (B, H_kv, S, D); query head h reads key and value head h // (H / H_kv)
    seed: int64 scalar, on q's device or the CPU, that fixes the dropout mask, as `philox.dropout_keep_mask` says; None:
        no dropout
    returns: O (B, H, T, D) in the dtype of q; lse (B, H, T) in the computing dtype
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    group = H // H_kv
    dtype = computing_dtype(q)

    with torch.autocast(q.device.type, enabled=False):
        # The query heads that share a key head are stacked into one taller matrix, so K and V are never repeated.
        Q = q.to(dtype).reshape(B * H_kv, group * T, D)
        K = k.to(dtype).reshape(B * H_kv, S, D)
        V = v.to(dtype).reshape(B * H_kv, S, D)
        mask = _causal_mask(T, S, window, dtype, q.device).repeat(group, 1)  # (group · T, S)
        scores = torch.baddbmm(mask, Q, K.mT, alpha=scale)  # (B · H_kv, group · T, S)
        P = scores.softmax(dim=-1)
        if seed is not None:
            keep = dropout_keep_mask(seed, dropout_p, B * H, T, S, q.device).view_as(P)
            P = P * (keep.to(dtype) / (1 - dropout_p))
        out = (P @ V).view(B, H, T, D).to(q.dtype)
        if return_lse:
            return out, scores.logsumexp(dim=-1).view(B, H, T)
    return out


def _causal_mask(T: int, S: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, S): 0 where query i may look, that is at keys S − T + i − window < s ≤ S − T + i, and −∞ elsewhere."""
    hidden = torch.full((T, S), -torch.inf, dtype=dtype, device=device)
    future = hidden.triu(S - T + 1)
    return future if window is None else future + hidden.tril(S - T - window)


# ------------------------------------------------------------------------------------------------------------ operators


def register(library: OperatorLibrary) -> Any:
    """Operators over the kernels

    - `causal_attention_forward(q, k, v, *options) -> O, lse`,
    - `causal_attention_backward(dO?, dlse?, q, k, v, O, lse, *options) -> dQ, dK, dV`,

    where `options` are the values of NAMES, and O, dQ, dK and dV come over (B, T, H, D) memory.
    """

    def differentiate(ctx: Any, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        gradients = library.ops.causal_attention_backward(out, lse, *tensors, *ctx.options, seed)
        return *gradients, *[None] * (1 + len(ctx.options))

    library.define(
        "causal_attention",
        f"(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor out, Tensor lse)",
        lambda *arguments: call(library, "causal_attention_forward", *arguments),
        _fake_attend,
        (_save_for_attend, differentiate),
        lambda q, k, *_, **__: 2 * _product_flops(q, k),
    )
    library.define(
        "causal_attention_backward",
        "(Tensor? out_gradient, Tensor? lse_gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
        lambda dO, dlse, q, k, v, *rest: (
            call(library, "causal_attention_backward", dO, dlse, q, k, v, *rest)
            if q.numel() and k.numel()
            else tuple(torch.zeros_like(x) for x in (q, k, v))  # without queries no kernel would write dK and dV
        ),
        _fake_attend_backward,
        (_save_for_attend_backward, _differentiate_attend_backward),
        lambda _, __, q, k, *___, **____: 5 * _product_flops(q, k),
    )

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        dropout_p: float,
        window: int | None,
        seed: Tensor | None,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `reference`; D above MAX_HEAD_SIZE is left to it."""
        options = (scale, dropout_p, window, seed)
        if q.shape[-1] > MAX_HEAD_SIZE or only_reference(q, k, v):
            named: Any = dict(zip(NAMES, options, strict=True))
            return reference(q, k, v, **named, return_lse=return_lse)
        library.count_flops()
        outputs = library.ops.causal_attention(q, k, v, *options)
        return outputs if return_lse else outputs[0]  # type: ignore[no-any-return]

    return attend


def call(library: OperatorLibrary, kernel: str, *arguments: Any) -> Any:
    """A kernel of attention, whose last argument is the seed."""
    seed = arguments[-1]
    if library.device == "CUDA" and seed is not None and seed.device.type == "cpu":
        refuse_capture()
    return getattr(library.kernels(), kernel)(*arguments)


def _product_flops(q: Sequence[int], k: Sequence[int]) -> int:
    """Of one product of a (T, D) and a (D, S) matrix for each head; what is hidden is counted too, as torch does."""
    B, H, T, D = q
    return 2 * B * H * T * k[2] * D


def _fake_attend(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_by_time(q), q.new_empty(q.shape[:3], dtype=computing_dtype(q))


def _fake_attend_backward(_: Any, __: Any, q: Tensor, k: Tensor, v: Tensor, *___: Any) -> tuple[Tensor, ...]:
    return _empty_by_time(q), _empty_by_time(k), _empty_by_time(v)


def _save_for_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, seed)


def _save_for_attend_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out_gradient, lse_gradient, q, k, v, out, lse, *ctx.options, seed = inputs
    ctx.save_for_backward(out_gradient, lse_gradient, q, k, v, out, lse, seed)


def _differentiate_attend_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Second and higher derivatives are rare and have no kernel: they are the reference's."""
    out_gradient, lse_gradient, q, k, v, out, lse, seed = ctx.saved_tensors
    options = dict(zip(NAMES, (*ctx.options, seed), strict=True))
    given = [gradient is not None for gradient in (out_gradient, lse_gradient)]
    cotangents = (
        torch.zeros_like(out) if out_gradient is None else out_gradient,
        torch.zeros_like(lse) if lse_gradient is None else lse_gradient,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return reference(q, k, v, **options, return_lse=True)

    def gradient(cotangents: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(attend, q, k, v)[1](cotangents)  # type: ignore[no-any-return]

    dcotangents, *dqkv = torch.func.vjp(gradient, cotangents, q, k, v)[1](tuple(upstream))
    dcotangents = [x if wanted else None for x, wanted in zip(dcotangents, given, strict=True)]
    return *dcotangents, *dqkv, None, None, *[None] * (1 + len(ctx.options))


def _empty_by_time(x: Tensor) -> Tensor:
    """As x (B, H, T, D), over (B, T, H, D) memory."""
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


OPERATION = Operation("causal_attention", reference, register)
