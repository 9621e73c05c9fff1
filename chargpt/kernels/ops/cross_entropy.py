"""Softmax cross-entropy: the public functions, the reference, and the operators that a backend's kernels become."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.common import Operation, OperatorLibrary, computing_dtype, only_reference, shape_of

NAMES = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")
OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, str reduction"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def softmax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of softmax(logits) against integer targets: −log softmax(x)[target] for each row x.

    logits: (..., V), floating
    targets: (...), integer, in [0, V) or equal to ignore_index
    ignore_index: rows with this target have loss 0 and gradient 0 (if their logits have a softmax at all)
    label_smoothing: in [0, 1]; the target distribution is (1 − ε) · one-hot + ε / V, as torch defines it
    z_loss: adds z_loss · lse² to each row, lse = log Σ exp(x), which keeps the normaliser near 1 (Chowdhery et al.
        2022, section 5)
    softcap: the logits x become c · tanh(x / c) first (Gemma 2, section 2)
    reduction: "none": (...); "sum"; "mean": the sum divided by the number of rows that are not ignored. Where there
        is no such row the mean is 0 with gradient 0, so that an empty batch changes nothing (torch gives NaN).
    impl: "auto", or the name of an implementation
    returns: float32, or float64 for float64 logits

    Raises IndexError for a target out of range on the CPU; on a GPU, which nobody waits for, the CUDA and Triton
    kernels make its row's loss and gradient NaN, and the reference's device asserts. ValueError for tensors that do
    not fit together, ConfigError when `impl` cannot run.
    """
    _check(logits, targets)
    check_options(targets, label_smoothing, z_loss, softcap, reduction)
    chosen = registry.function("softmax_cross_entropy", logits.device.type, logits.dtype, impl)
    try:
        return chosen(  # type: ignore[no-any-return]
            logits,
            targets,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
        )
    except (IndexError, RuntimeError):
        if targets.device.type == "cpu":
            check_targets(targets, logits.shape[-1], ignore_index)
        raise


def losses_and_gradient(
    lose: Callable[..., Tensor], logits: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The losses (N,) of the logits (N, V), and the gradient (N, V) of their sum. lose: as `softmax_cross_entropy`."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = lose(leaf, targets, **options, reduction="none")
        return losses.detach(), torch.autograd.grad(losses, leaf, torch.ones_like(losses))[0]


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be (..., V) with V at least 1 and targets (...), "
            f"got {shape_of(logits)} and {shape_of(targets)}"
        )
    if not logits.dtype.is_floating_point:
        raise ValueError(f"logits must have a floating dtype, got {logits.dtype}")
    if logits.device != targets.device:
        raise ValueError(f"logits and targets must be on one device, got {logits.device} and {targets.device}")


def check_options(
    targets: Tensor, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> None:
    """Raise ValueError for what no kernel is asked for."""
    if targets.dtype not in _INTEGERS:
        raise ValueError(f"targets must have an integer dtype, got {targets.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < math.inf:  # so written that NaN fails too
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}")


def check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    """Raise IndexError that names the first target out of range."""
    bad = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"targets must be in [0, {V}) or ignore_index={ignore_index}, "
            f"got {int(targets[position])} at position {position}"
        ) from None


# ------------------------------------------------------------------------------------------------------------ reference


def reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    """−log softmax(x)[target] for each row x of the logits, with the options of `chargpt.kernels`.

    logits: (..., V); targets: (...)
    returns: (...) for reduction "none", otherwise a scalar, in the computing dtype
    """
    V = logits.shape[-1]
    with torch.autocast(logits.device.type, enabled=False):
        x = logits.to(computing_dtype(logits)).reshape(-1, V)  # (N, V)
        y = targets.long().reshape(-1)  # (N)
        valid = y != ignore_index
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        log_p = F.log_softmax(x, dim=-1)
        loss = F.nll_loss(log_p, y, ignore_index=ignore_index, reduction="none")  # (N)
        if label_smoothing > 0:
            loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=-1)
        if z_loss > 0:
            loss = loss + z_loss * x.logsumexp(dim=-1) ** 2
        if label_smoothing > 0 or z_loss > 0:
            loss = loss.masked_fill(~valid, 0.0)
        if reduction == "none":
            return loss.view(targets.shape)
        if reduction == "sum":
            return loss.sum()
        return loss.sum() / valid.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------------------ operators


def register(library: OperatorLibrary) -> Any:
    """Operators over the kernels

    - `softmax_cross_entropy_forward(logits, targets, *options) -> loss, normalisers`,
    - `softmax_cross_entropy_backward(dloss, logits, targets, normalisers, *options) -> dlogits`,

    where `options` are the values of NAMES, and the normalisers, (2, N), are what the backward needs of each row: its
    largest logit m, and the sum of exp(x − m).

    With `gradient_in_forward` the forward computes the gradient of the logits while a row is at hand, where it is
    wanted. It takes one more argument, with_gradient, and returns one more value: the gradient of the reduced loss, or
    None. Such kernels also bring `scale_(gradient, factor)`, which multiplies in place by the one number that the
    device holds in `factor`, and leaves the gradient alone where it is 1, as it nearly always is.
    """

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        extra = (False,) if library.gradient_in_forward else ()
        return library.kernels().softmax_cross_entropy_forward(*arguments, *extra)[:2]  # type: ignore[no-any-return]

    def differentiate(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient = library.ops.softmax_cross_entropy_backward(loss_gradient, *ctx.saved_tensors, *ctx.options)
        return gradient, *[None] * (1 + len(ctx.options))

    library.define(
        "softmax_cross_entropy",
        f"(Tensor logits, Tensor targets, {OPTIONS}) -> (Tensor loss, Tensor normalisers)",
        forward,
        _fake_cross_entropy,
        (_save_for_cross_entropy, differentiate),
    )
    library.define(
        "softmax_cross_entropy_backward",
        f"(Tensor loss_gradient, Tensor logits, Tensor targets, Tensor normalisers, {OPTIONS}) -> Tensor",
        lambda *arguments: library.kernels().softmax_cross_entropy_backward(*arguments),
        lambda loss_gradient, logits, *_: logits.new_empty(logits.shape),
        (_save_for_cross_entropy_backward, _differentiate_cross_entropy_backward),
    )
    if library.gradient_in_forward:
        library.define(
            "softmax_cross_entropy_with_gradient",
            f"(Tensor logits, Tensor targets, {OPTIONS}) -> (Tensor loss, Tensor normalisers, Tensor gradient)",
            lambda *arguments: library.kernels().softmax_cross_entropy_forward(*arguments, True),
            lambda logits, *rest: (*_fake_cross_entropy(logits, *rest), logits.new_empty(logits.shape)),
        )
        library.define(
            "scale_",
            "(Tensor(a!) gradient, Tensor factor) -> ()",
            lambda gradient, factor: library.kernels().scale_(gradient, factor),
            lambda gradient, factor: None,
        )

    def lose(
        logits: Tensor,
        targets: Tensor,
        *,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        reduction: str,
    ) -> Tensor:
        """As `reference`."""
        options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
        if only_reference(logits, targets):
            named: Any = dict(zip(NAMES, options, strict=True))
            return reference(logits, targets, **named)
        wanted = library.gradient_in_forward and torch.is_grad_enabled() and logits.requires_grad
        # The gradient of a mean underflows in float16 before the factor, a loss scale, can multiply it.
        at_once = reduction != "none" and logits.dtype != torch.float16 and not torch.compiler.is_compiling()
        if wanted and at_once:
            loss: Tensor = _GradientInForward.apply(library.ops, logits, targets, *options)  # type: ignore[no-untyped-call]
            return loss
        return library.ops.softmax_cross_entropy(logits, targets, *options)[0]  # type: ignore[no-any-return]

    return lose


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


def _fake_cross_entropy(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(targets.shape if options[-1] == "none" else (), dtype=computing_dtype(logits))
    return loss, logits.new_empty((2, targets.numel()), dtype=computing_dtype(logits))


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
    options = dict(zip(NAMES, ctx.options, strict=True))

    def gradient(loss_gradient: Tensor, logits: Tensor) -> Tensor:
        pull_back = torch.func.vjp(lambda x: reference(x, targets, **options), logits)[1]
        return pull_back(loss_gradient)[0]  # type: ignore[no-any-return]

    pull_back = torch.func.vjp(gradient, loss_gradient, logits)[1]
    return *pull_back(upstream), None, None, *[None] * len(ctx.options)


OPERATION = Operation("softmax_cross_entropy", reference, register)
