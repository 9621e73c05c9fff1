"""The kernels of one implementation as torch.library operators, and the two functions that call them.

Every implementation has the same operators in a namespace of its own, so that two of them can serve one device. An
operator is what torch.compile, fake tensors and dispatch modes can see. Inside torch.func transforms the reference
computes, because they do not look into operators that are registered from Python.

The dropout seed lies on the CPU and becomes an argument of the launch, which a CUDA graph would repeat at every replay.
So torch.compile leaves attention out of its graphs, by a tag that cannot depend on dropout; a graph that somebody else
captures may hold attention without dropout, and with dropout it is refused.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from chargpt.kernels import reference
from chargpt.kernels.philox import refuse_capture

MAX_HEAD_SIZE = 256  # the largest D that the kernels take: kMaxHeadSize in csrc/
_ATTENTION_NAMES = ("scale", "dropout_p", "window", "seed")
_ATTENTION_OPTIONS = "float scale, float dropout_p, int? window, Tensor? seed"
_CROSS_ENTROPY_NAMES = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")
_CROSS_ENTROPY_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, str reduction"


class Kernels(Protocol):
    """What an implementation brings: functions of plain tensors that know nothing of autograd.

    `options` are the values of `_ATTENTION_NAMES` or `_CROSS_ENTROPY_NAMES`, in that order. O, dQ, dK and dV come over
    (B, T, H, D) memory. The normalisers, (2, N), are what the backward needs of each row: its largest logit m, and the
    sum of exp(x − m).
    """

    causal_attention_forward: Callable[..., Any]  # (q, k, v, *options) -> O, lse
    causal_attention_backward: Callable[..., Any]  # (dO?, dlse?, q, k, v, O, lse, *options) -> dQ, dK, dV
    softmax_cross_entropy_forward: Callable[..., Any]  # (logits, targets, *options) -> loss, normalisers
    softmax_cross_entropy_backward: Callable[..., Any]  # (dloss, logits, targets, normalisers, *options) -> dlogits


class Operators:
    """The operators `torch.ops.<namespace>.…`, and functions that take what the reference's take.

    device: the dispatch key that the kernels serve, "CPU" or "CUDA"
    kernels: called by every kernel call, so that loading can wait for the first one
    """

    def __init__(self, namespace: str, device: str, kernels: Callable[[], Any]) -> None:
        self._library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
        self._device, self._kernels = device, kernels
        self._ops = getattr(torch.ops, namespace)
        self._register_attention()
        self._register_cross_entropy()

    def causal_attention(
        self,
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
        """As `reference.causal_attention`; D above 256 is left to it."""
        options = (scale, dropout_p, window, seed)
        if q.shape[-1] > MAX_HEAD_SIZE or _inside_functorch():
            named: Any = dict(zip(_ATTENTION_NAMES, options, strict=True))
            return reference.causal_attention(q, k, v, **named, return_lse=return_lse)
        outputs = self._ops.causal_attention(q, k, v, *options)
        return outputs if return_lse else outputs[0]  # type: ignore[no-any-return]

    def softmax_cross_entropy(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        reduction: str,
    ) -> Tensor:
        """As `reference.softmax_cross_entropy`."""
        options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
        if _inside_functorch():
            named: Any = dict(zip(_CROSS_ENTROPY_NAMES, options, strict=True))
            return reference.softmax_cross_entropy(logits, targets, **named)
        return self._cross_entropy(logits, targets, *options)

    def _cross_entropy(self, logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
        return self._ops.softmax_cross_entropy(logits, targets, *options)[0]  # type: ignore[no-any-return]

    def _cross_entropy_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._kernels().softmax_cross_entropy_forward(*arguments)  # type: ignore[no-any-return]

    def _register_attention(self) -> None:
        def differentiate(ctx: Any, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor | None, ...]:
            *tensors, seed = ctx.saved_tensors
            gradients = self._ops.causal_attention_backward(out, lse, *tensors, *ctx.options, seed)
            return *gradients, *[None] * (1 + len(ctx.options))

        self._register(
            "causal_attention",
            f"(Tensor q, Tensor k, Tensor v, {_ATTENTION_OPTIONS}) -> (Tensor out, Tensor lse)",
            lambda *arguments: self._attend("causal_attention_forward", *arguments),
            _fake_attend,
            (_save_for_attend, differentiate),
            (torch.Tag.cudagraph_unsafe,),
        )
        self._register(
            "causal_attention_backward",
            "(Tensor? out_gradient, Tensor? lse_gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
            f"{_ATTENTION_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
            lambda *arguments: self._attend("causal_attention_backward", *arguments),
            _fake_attend_backward,
            (_save_for_attend_backward, _differentiate_attend_backward),
            (torch.Tag.cudagraph_unsafe,),
        )

    def _attend(self, kernel: str, *arguments: Any) -> Any:
        """Call a kernel of attention, whose last argument is the seed, or None."""
        if self._device == "CUDA" and arguments[-1] is not None:
            refuse_capture()
        return getattr(self._kernels(), kernel)(*arguments)

    def _register_cross_entropy(self) -> None:
        def differentiate(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
            gradient = self._ops.softmax_cross_entropy_backward(loss_gradient, *ctx.saved_tensors, *ctx.options)
            return gradient, *[None] * (1 + len(ctx.options))

        self._register(
            "softmax_cross_entropy",
            f"(Tensor logits, Tensor targets, {_CROSS_ENTROPY_OPTIONS}) -> (Tensor loss, Tensor normalisers)",
            self._cross_entropy_forward,
            _fake_cross_entropy,
            (_save_for_cross_entropy, differentiate),
        )
        self._register(
            "softmax_cross_entropy_backward",
            "(Tensor loss_gradient, Tensor logits, Tensor targets, Tensor normalisers, "
            f"{_CROSS_ENTROPY_OPTIONS}) -> Tensor",
            lambda *arguments: self._kernels().softmax_cross_entropy_backward(*arguments),
            lambda loss_gradient, logits, *_: logits.new_empty(logits.shape),
            (_save_for_cross_entropy_backward, _differentiate_cross_entropy_backward),
        )

    def _register(
        self,
        name: str,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        tags: tuple[torch.Tag, ...] = (),
    ) -> None:
        """autograd: what to save, and how to differentiate."""
        self._library.define(name + schema, tags=tags)  # type: ignore[no-untyped-call]
        self._library.impl(name, kernel, self._device)  # type: ignore[no-untyped-call]
        qualified = f"{self._library.ns}::{name}"
        torch.library.register_fake(qualified, fake, lib=self._library)
        if autograd is not None:
            save, differentiate = autograd
            torch.library.register_autograd(qualified, differentiate, setup_context=save, lib=self._library)


class OperatorsWithGradient(Operators):
    """For kernels that compute the gradient of the logits in the forward, while a row is at hand, where it is wanted.

    Their `softmax_cross_entropy_forward` takes one more argument, with_gradient, and returns one more value: the
    gradient of the reduced loss, or None. They also bring `scale_(gradient, factor)`, which multiplies in place by the
    one number that the device holds in `factor`, and leaves the gradient alone where it is 1, as it nearly always is.
    """

    def _cross_entropy(self, logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
        wanted = torch.is_grad_enabled() and logits.requires_grad and options[-1] != "none"
        # The gradient of a mean underflows in float16 before the factor, a loss scale, can multiply it.
        if wanted and logits.dtype != torch.float16 and not torch.compiler.is_compiling():
            return _GradientInForward.apply(self._ops, logits, targets, *options)  # type: ignore[no-any-return, no-untyped-call]
        return super()._cross_entropy(logits, targets, *options)

    def _cross_entropy_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, normalisers, _ = self._kernels().softmax_cross_entropy_forward(*arguments, False)
        return loss, normalisers

    def _register_cross_entropy(self) -> None:
        super()._register_cross_entropy()
        self._register(
            "softmax_cross_entropy_with_gradient",
            f"(Tensor logits, Tensor targets, {_CROSS_ENTROPY_OPTIONS}) "
            "-> (Tensor loss, Tensor normalisers, Tensor gradient)",
            lambda *arguments: self._kernels().softmax_cross_entropy_forward(*arguments, True),
            lambda logits, *rest: (*_fake_cross_entropy(logits, *rest), logits.new_empty(logits.shape)),
        )
        self._register(
            "scale_",
            "(Tensor(a!) gradient, Tensor factor) -> ()",
            lambda gradient, factor: self._kernels().scale_(gradient, factor),
            lambda gradient, factor: None,
        )


class _GradientInForward(torch.autograd.Function):
    """A mean or a sum knows its gradient but for the factor that arrives in the backward.

    So the forward computes it, and the first backward gives it away. Any other backward computes it from the logits.
    """

    @staticmethod
    def forward(ctx: Any, ops: Any, logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
        loss, normalisers, ctx.gradient = ops.softmax_cross_entropy_with_gradient(logits, targets, *options)
        ctx.save_for_backward(logits, targets, normalisers)
        ctx.ops, ctx.options = ops, options
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled():  # the second walk through this graph, or create_graph=True
            gradient = ctx.ops.softmax_cross_entropy_backward(loss_gradient, *ctx.saved_tensors, *ctx.options)
        else:
            ctx.ops.scale_(gradient, loss_gradient)
        return None, gradient, *[None] * (1 + len(ctx.options))


# ---------------------------------------------------------------------------------------- attention: fakes and autograd


def _fake_attend(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_by_time(q), q.new_empty(q.shape[:3], dtype=_row_dtype(q))


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
    options = dict(zip(_ATTENTION_NAMES, (*ctx.options, seed), strict=True))
    given = [gradient is not None for gradient in (out_gradient, lse_gradient)]
    cotangents = (
        torch.zeros_like(out) if out_gradient is None else out_gradient,
        torch.zeros_like(lse) if lse_gradient is None else lse_gradient,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return reference.causal_attention(q, k, v, **options, return_lse=True)

    def gradient(cotangents: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(attend, q, k, v)[1](cotangents)  # type: ignore[no-any-return]

    dcotangents, *dqkv = torch.func.vjp(gradient, cotangents, q, k, v)[1](tuple(upstream))
    dcotangents = [x if wanted else None for x, wanted in zip(dcotangents, given, strict=True)]
    return *dcotangents, *dqkv, None, None, *[None] * (1 + len(ctx.options))


def _empty_by_time(x: Tensor) -> Tensor:
    """As x (B, H, T, D), over (B, T, H, D) memory."""
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def _row_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------ cross-entropy: fakes and autograd


def _fake_cross_entropy(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(targets.shape if options[-1] == "none" else (), dtype=_row_dtype(logits))
    return loss, logits.new_empty((2, targets.numel()), dtype=_row_dtype(logits))


def _save_for_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _save_for_cross_entropy_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    loss_gradient, logits, targets, _, *ctx.options = inputs
    ctx.save_for_backward(loss_gradient, logits, targets)


def _differentiate_cross_entropy_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Second and higher derivatives are rare and have no kernel: they are the reference's."""
    loss_gradient, logits, targets = ctx.saved_tensors
    options = dict(zip(_CROSS_ENTROPY_NAMES, ctx.options, strict=True))

    def gradient(loss_gradient: Tensor, logits: Tensor) -> Tensor:
        pull_back = torch.func.vjp(lambda x: reference.softmax_cross_entropy(x, targets, **options), logits)[1]
        return pull_back(loss_gradient)[0]  # type: ignore[no-any-return]

    pull_back = torch.func.vjp(gradient, loss_gradient, logits)[1]
    return *pull_back(upstream), None, None, *[None] * len(ctx.options)


def _inside_functorch() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
