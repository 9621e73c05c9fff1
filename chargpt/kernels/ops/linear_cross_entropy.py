"""The loss of a model's head, without ever holding all of its logits where they are many.

GPT-2's head makes 50,257 logits for each token: at 4,096 tokens 412 MB in bfloat16, and their gradient as much again.
Here some hundred tokens at a time become logits, a loss, and gradients, in one buffer that they share. A mean or a sum
knows its gradient but for one factor, so the forward does all of it and the backward multiplies. The idea is that of
Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.common import computing_dtype, is_batched, only_reference, shape_of
from chargpt.kernels.ops.cross_entropy import (
    NAMES,
    check_options,
    check_targets,
    losses_and_gradient,
    softmax_cross_entropy,
)

LOGITS_BYTES = {"cpu": 48 << 20}  # of the logits at a time, by the device's type
OTHERS_BYTES = 512 << 20  # on a GPU: wide enough for its products, and small in its memory
SLICE_BYTES = 12 << 20  # of the part of the weight's gradient that is rounded to 16 bits before it is added up


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`softmax_cross_entropy` of the logits `h @ weight.T + bias`, which nobody else will see.

    h: (..., C), floating: hidden states
    weight: (V, C), floating; bias: (V,) or None
    other arguments: as in `softmax_cross_entropy`
    returns: float32, or float64 for float64 logits

    Where the logits would take more than LOGITS_BYTES they are made in parts of that size; the gradient of the weight
    is then added up in the weight's dtype, whatever autocast multiplies in. The reference, torch.compile and the
    gradient of a loss that is not reduced make them whole. Deterministic.
    Raises as `softmax_cross_entropy` does, and ValueError where h, weight and bias do not fit together.
    """
    _check(h, weight, targets, bias)
    check_options(targets, label_smoothing, z_loss, softcap, reduction)
    options: dict[str, Any] = dict(zip(NAMES, (ignore_index, label_smoothing, z_loss, softcap), strict=False))
    device = h.device.type
    autocast = _autocast_dtype(device)
    dtype = h.dtype if autocast is None or h.dtype == torch.float64 else autocast  # which leaves float64 alone
    rows = _rows(device, weight.shape[0], dtype)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, weight, bias))
    whole = targets.numel() <= rows or (learns and reduction == "none") or torch.compiler.is_compiling()
    if whole or only_reference(h, weight, targets, bias) or _backend(device, dtype, impl).name == "torch":
        logits = F.linear(h, weight, bias)
        return softmax_cross_entropy(logits, targets, **options, reduction=reduction, impl=impl)
    work = _Work(rows, dtype, options, impl)
    try:
        if learns:
            return _InParts.apply(h, weight, bias, targets, work, reduction)  # type: ignore[no-untyped-call, no-any-return]
        return _reduced(work.losses(h, weight, bias, targets), targets, ignore_index, reduction)
    except (IndexError, RuntimeError):
        if device == "cpu":
            check_targets(targets, weight.shape[0], ignore_index)  # by their position among all
        raise


def _check(h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if h.dim() == 0 or weight.dim() != 2 or h.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"h must be (..., C) and weight (V, C) with V at least 1, got {shape_of(h)} and {shape_of(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {shape_of(bias)}")
    if h.shape[:-1] != targets.shape:
        raise ValueError(f"h must be (..., C) and targets (...), got {shape_of(h)} and {shape_of(targets)}")
    devices = {str(x.device) for x in (h, weight, targets, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"h, weight, targets and bias must be on one device, got {' and '.join(sorted(devices))}")
    if _autocast_dtype(h.device.type) is None and len({x.dtype for x in (h, weight, bias) if x is not None}) > 1:
        raise ValueError(f"h, weight and bias must have one dtype outside autocast, got {h.dtype} and {weight.dtype}")


def _autocast_dtype(device: str) -> torch.dtype | None:
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _rows(device: str, V: int, dtype: torch.dtype) -> int:
    return max(1, LOGITS_BYTES.get(device, OTHERS_BYTES) // (V * dtype.itemsize))


def _backend(device: str, dtype: torch.dtype, impl: str) -> registry.Backend:
    return registry.BACKENDS[registry.choose("softmax_cross_entropy", device, dtype, impl)]


def _reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The losses (N,), as `softmax_cross_entropy` reduces them."""
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum(dtype=torch.float64)
    if reduction == "mean":
        total = total / (targets != ignore_index).sum().clamp(min=1)
    return total.to(losses.dtype)


@dataclass(frozen=True)
class _Work:
    """How the logits are made, `rows` at a time, in `dtype`."""

    rows: int
    dtype: torch.dtype
    options: Mapping[str, Any]
    impl: str

    def losses(self, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Of each row: (N,)."""
        x, w, b, y = self._given(h, weight, bias, targets)
        parts = [
            softmax_cross_entropy(F.linear(part, w, b), target, **self.options, reduction="none", impl=self.impl)
            for part, target in zip(torch.split(x, self.rows), torch.split(y, self.rows), strict=True)
        ]
        return torch.cat(parts)

    def losses_and_gradients(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Also the gradients of the losses' sum with respect to those of h, weight and bias that are wanted."""
        x, w, b, y = self._given(h, weight, bias, targets)
        functions = _backend(h.device.type, self.dtype, self.impl).functions
        of_logits = functions.get("softmax_cross_entropy_gradient_") or functools.partial(
            losses_and_gradient, functions["softmax_cross_entropy"]
        )
        add = functions.get("add_transposed_product_", add_transposed_product_)
        buffer = x.new_empty(self.rows, len(w))
        losses = x.new_empty(len(x), dtype=computing_dtype(x))
        dx = torch.empty_like(x) if wanted[0] else None
        # In float32 at least: one addend for each part, where a product adds up all rows at once.
        dw = torch.zeros_like(w, dtype=computing_dtype(w)) if wanted[1] else None
        db = torch.zeros_like(w[:, 0], dtype=computing_dtype(w)) if wanted[2] else None
        for start in range(0, len(x), self.rows):
            rows = slice(start, start + self.rows)
            part = x[rows]
            logits = buffer[: len(part)]
            if b is None:
                torch.mm(part, w.t(), out=logits)
            else:
                torch.addmm(b, part, w.t(), out=logits)
            losses[rows], gradient = of_logits(logits, y[rows], **self.options)
            if dx is not None:
                torch.mm(gradient, w, out=dx[rows])
            if dw is not None:
                add(dw, gradient, part)
            if db is not None:
                db += gradient.sum(0, dtype=db.dtype)
        found = [dx if dx is None else dx.view(h.shape), dw, db]  # of a view of dw autograd would add up a copy
        for i, like in enumerate((h, weight, bias)):
            if (one := found[i]) is not None and like is not None:
                found[i] = one.to(like.dtype)
        return losses, found

    def _given(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        b = None if bias is None else bias.detach().to(self.dtype)
        x, w = h.detach().reshape(-1, h.shape[-1]).to(self.dtype), weight.detach().to(self.dtype)
        return x, w, b, targets.reshape(-1)  # (N, C), (V, C), (V,), (N,)


def add_transposed_product_(c: Tensor, a: Tensor, b: Tensor) -> None:
    """c (M, N) += a (K, M) transposed · b (K, N).

    torch has no product of 16 bits that adds to 32: for a float32 c it is rounded first, SLICE_BYTES at a time.
    """
    if c.dtype == b.dtype:
        c.addmm_(a.t(), b)
        return
    height = max(1, SLICE_BYTES // (b.shape[1] * b.element_size()))
    for rows, columns in zip(torch.split(c, height), torch.split(a, height, dim=1), strict=True):
        rows += columns.t() @ b


class _InParts(torch.autograd.Function):
    """The first backward gives away what the forward computed; any other computes it again."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, work: _Work, reduction: str
    ) -> Tensor:
        losses, ctx.gradients = work.losses_and_gradients(h, weight, bias, targets, ctx.needs_input_grad[:3])
        ctx.work, ctx.reduction = work, reduction
        ctx.save_for_backward(h, weight, bias, targets)
        return _reduced(losses, targets, work.options["ignore_index"], reduction)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, targets = ctx.saved_tensors
        work, wanted = ctx.work, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True
            # Views, so that each is asked for alone, though one may have been made of another.
            h, weight, bias = h.view_as(h), weight.view_as(weight), None if bias is None else bias.view_as(bias)
            logits = F.linear(h.to(work.dtype), weight.to(work.dtype), None if bias is None else bias.to(work.dtype))
            loss = softmax_cross_entropy(logits, targets, **work.options, reduction=ctx.reduction, impl=work.impl)
            inputs = [x for x, needed in zip((h, weight, bias), wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
            return *(next(found) if needed else None for needed in wanted), None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = work.losses_and_gradients(h, weight, bias, targets, wanted)[1]
        factor = upstream
        if ctx.reduction == "mean":
            factor = upstream / (targets != work.options["ignore_index"]).sum().clamp(min=1)
        # Batched gradients want a result for each of their factors.
        multiply = torch.mul if is_batched(upstream) else Tensor.mul_
        return *(None if one is None else multiply(one, factor) for one in gradients), None, None, None
