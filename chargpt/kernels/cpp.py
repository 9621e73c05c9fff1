"""The C++ kernels for the CPU, as functions that take what the reference's take, and as torch.library operators.

Plain tensors in eager mode go straight to the native module, which has its own autograd nodes: at the sizes of a small
GPT a trip through Python operators costs as much as the kernel. Whatever needs to see an operator (torch.compile, fake
tensors, dispatch modes) gets one; both run the same C++. Inside torch.func transforms the reference computes, because
they do not look into operators that are registered from Python.
"""

from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import native, reference

_LIBRARY = torch.library.Library("chargpt", "DEF")  # type: ignore[no-untyped-call]
MAX_HEAD_SIZE = 256  # kMaxHeadSize in csrc/cpu/attention.h
_ATTENTION_NAMES = ("scale", "dropout_p", "window", "seed")
_ATTENTION_OPTIONS = "float scale, float dropout_p, int? window, Tensor? seed"
_CROSS_ENTROPY_NAMES = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")
_CROSS_ENTROPY_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, str reduction"


def causal_attention(
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
    """As `reference.causal_attention`, for float32, bfloat16 and float64 on the CPU; D above 256 is left to it."""
    options = (scale, dropout_p, window, seed)
    compiling = torch.compiler.is_compiling()
    if not compiling and _module().is_plain(q, k, v) and q.shape[-1] <= MAX_HEAD_SIZE:
        outputs = _module().causal_attention(q, k, v, *options)
    elif q.shape[-1] > MAX_HEAD_SIZE or (not compiling and torch._C._are_functorch_transforms_active()):
        named = dict(zip(_ATTENTION_NAMES, options, strict=True))
        outputs = reference.causal_attention(q, k, v, **named, return_lse=True)  # type: ignore[arg-type]
    else:
        outputs = torch.ops.chargpt.causal_attention(q, k, v, *options)
    return outputs if return_lse else outputs[0]  # type: ignore[no-any-return]


def softmax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    """As `reference.softmax_cross_entropy`, for float32, bfloat16 and float64 logits on the CPU."""
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    if not torch.compiler.is_compiling():
        if _module().is_plain(logits, targets):
            return _module().softmax_cross_entropy(logits, targets, *options)  # type: ignore[no-any-return]
        if torch._C._are_functorch_transforms_active():
            named = dict(zip(_CROSS_ENTROPY_NAMES, options, strict=True))
            return reference.softmax_cross_entropy(logits, targets, **named)  # type: ignore[arg-type]
    return torch.ops.chargpt.softmax_cross_entropy(logits, targets, *options)[0]  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------ operators

_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"causal_attention(Tensor q, Tensor k, Tensor v, {_ATTENTION_OPTIONS}) -> (Tensor out, Tensor lse)"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "causal_attention_backward(Tensor? out_gradient, Tensor? lse_gradient, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_ATTENTION_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
# The loss, and what the backward needs of each row: normalisers (2, N), the largest logit m and the sum of exp(x - m).
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"softmax_cross_entropy(Tensor logits, Tensor targets, {_CROSS_ENTROPY_OPTIONS}) "
    "-> (Tensor loss, Tensor normalisers)"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "softmax_cross_entropy_backward(Tensor loss_gradient, Tensor logits, Tensor targets, Tensor normalisers, "
    f"{_CROSS_ENTROPY_OPTIONS}) -> Tensor"
)


def _attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _module().causal_attention_forward(*arguments)  # type: ignore[no-any-return]


def _attend_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _module().causal_attention_backward(*arguments)  # type: ignore[no-any-return]


def _fake_attend(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_by_time(q), q.new_empty(q.shape[:3], dtype=_row_dtype(q))


def _fake_attend_backward(_: Any, __: Any, q: Tensor, k: Tensor, v: Tensor, *___: Any) -> tuple[Tensor, ...]:
    return _empty_by_time(q), _empty_by_time(k), _empty_by_time(v)


def _save_for_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, seed)


def _differentiate_attend(ctx: Any, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = torch.ops.chargpt.causal_attention_backward(out, lse, *tensors, *ctx.options, seed)
    return *gradients, *[None] * (1 + len(ctx.options))


def _save_for_attend_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out_gradient, lse_gradient, q, k, v, out, lse, *ctx.options, seed = inputs
    ctx.save_for_backward(out_gradient, lse_gradient, q, k, v, out, lse, seed)


def _differentiate_attend_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Second and higher derivatives are rare and have no kernel: they are the reference's."""
    out_gradient, lse_gradient, q, k, v, out, lse, seed = ctx.saved_tensors
    options = dict(zip(_ATTENTION_NAMES, (*ctx.options, seed), strict=True))
    given = [gradient is not None for gradient in (out_gradient, lse_gradient)]
    cotangents = (
        torch.zeros_like(out) if out_gradient is None else out_gradient,
        torch.zeros_like(lse) if lse_gradient is None else lse_gradient,
    )

    def gradient(cotangents: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        pull_back = torch.func.vjp(lambda *qkv: reference.causal_attention(*qkv, **options, return_lse=True), q, k, v)[
            1
        ]
        return pull_back(cotangents)  # type: ignore[no-any-return]

    dcotangents, *dqkv = torch.func.vjp(gradient, cotangents, q, k, v)[1](tuple(upstream))
    dcotangents = [x if wanted else None for x, wanted in zip(dcotangents, given, strict=True)]
    return *dcotangents, *dqkv, None, None, *[None] * (1 + len(ctx.options))


def _empty_by_time(x: Tensor) -> Tensor:
    """As x (B, H, T, D), over (B, T, H, D) memory."""
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def _row_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _module().softmax_cross_entropy_forward(*arguments)  # type: ignore[no-any-return]


def _backward(*arguments: Any) -> Tensor:
    return _module().softmax_cross_entropy_backward(*arguments)  # type: ignore[no-any-return]


def _fake_forward(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(targets.shape if options[-1] == "none" else (), dtype=_row_dtype(logits))
    return loss, logits.new_empty((2, targets.numel()), dtype=_row_dtype(logits))


def _fake_backward(loss_gradient: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_for_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate_forward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.chargpt.softmax_cross_entropy_backward(loss_gradient, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * (1 + len(ctx.options))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    loss_gradient, logits, targets, _, *ctx.options = inputs
    ctx.save_for_backward(loss_gradient, logits, targets)


def _differentiate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Second and higher derivatives are rare and have no kernel: they are the reference's."""
    loss_gradient, logits, targets = ctx.saved_tensors
    options = dict(zip(_CROSS_ENTROPY_NAMES, ctx.options, strict=True))

    def gradient(loss_gradient: Tensor, logits: Tensor) -> Tensor:
        pull_back = torch.func.vjp(lambda x: reference.softmax_cross_entropy(x, targets, **options), logits)[1]
        return pull_back(loss_gradient)[0]  # type: ignore[no-any-return]

    pull_back = torch.func.vjp(gradient, loss_gradient, logits)[1]
    return *pull_back(upstream), None, None, *[None] * len(ctx.options)


def _module() -> Any:
    return native.load().module


def _register() -> None:
    for name, kernel, fake, differentiate, save in (
        ("causal_attention", _attend, _fake_attend, _differentiate_attend, _save_for_attend),
        (
            "causal_attention_backward",
            _attend_backward,
            _fake_attend_backward,
            _differentiate_attend_backward,
            _save_for_attend_backward,
        ),
        ("softmax_cross_entropy", _forward, _fake_forward, _differentiate_forward, _save_for_forward),
        ("softmax_cross_entropy_backward", _backward, _fake_backward, _differentiate_backward, _save_for_backward),
    ):
        _LIBRARY.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"chargpt::{name}", fake, lib=_LIBRARY)
        torch.library.register_autograd(f"chargpt::{name}", differentiate, setup_context=save, lib=_LIBRARY)


_register()
