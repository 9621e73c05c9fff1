"""A block's small operators as torch.library operators, beside those of `operators.py` and for the same reasons.

They are seen by dispatch modes and fake tensors, and they differentiate a gradient again. torch.compile and torch.func
get the reference, which they can look into.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import reference
from chargpt.kernels.operators import Operators, _inside_functorch, _row_dtype

_HEADS_OPTIONS = "Tensor? cos, Tensor? sin, int n_head, int n_kv_head, bool qk_norm"


class BlockOperators(Operators):
    """For kernels that also bring

    - `rms_norm_forward(x, dtype) -> normed, rstd` and `rms_norm_backward(dnormed, x, rstd) -> dx`,
    - `qkv_heads_forward(qkv, value_rows?, cos?, sin?, n_head, n_kv_head, qk_norm) -> q, k, v`, in memory of their own,
    - `qkv_heads_backward(dq?, dk?, dv?, qkv?, cos?, sin?, n_head, n_kv_head, qk_norm) -> dqkv`; qkv comes with a norm,
    - `relu_squared_forward(x) -> y` and `relu_squared_backward(dy, x) -> dx`.
    """

    def __init__(self, namespace: str, device: str, kernels: Callable[[], Any]) -> None:
        super().__init__(namespace, device, kernels)
        self._register_rms_norm()
        self._register_qkv_heads()
        self._register_relu_squared()

    def add_rms_norm(self, x: Tensor, y: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `reference.add_rms_norm`. The addition is torch's: an operator must not return its argument x."""
        if _inside_functorch():
            return reference.add_rms_norm(x, y, dtype=dtype)
        s = x if y is None else (x + y).to(x.dtype)
        return s, self._ops.rms_norm(s, dtype)[0]

    def qkv_heads(
        self,
        qkv: Tensor,
        value_rows: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        n_head: int,
        n_kv_head: int,
        qk_norm: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `reference.qkv_heads`."""
        if _inside_functorch():
            options: Any = {"n_head": n_head, "n_kv_head": n_kv_head, "qk_norm": qk_norm}
            return reference.qkv_heads(qkv, value_rows, cos, sin, **options)
        return self._ops.qkv_heads(qkv, value_rows, cos, sin, n_head, n_kv_head, qk_norm)  # type: ignore[no-any-return]

    def relu_squared(self, x: Tensor) -> Tensor:
        """As `reference.relu_squared`."""
        return reference.relu_squared(x) if _inside_functorch() else self._ops.relu_squared(x)

    def _register_rms_norm(self) -> None:
        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(inputs[0], output[1])

        def differentiate(ctx: Any, dnormed: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
            return self._ops.rms_norm_backward(dnormed, *ctx.saved_tensors), None

        def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs[:2])

        def differentiate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
            dnormed, x = ctx.saved_tensors
            return *_second(
                lambda x: reference.add_rms_norm(x, None, dtype=dnormed.dtype)[1], dnormed, x, upstream
            ), None

        self._register(
            "rms_norm",
            "(Tensor x, ScalarType dtype) -> (Tensor normed, Tensor rstd)",
            lambda x, dtype: self._kernels().rms_norm_forward(x, dtype),
            lambda x, dtype: (
                x.new_empty(x.shape, dtype=dtype),
                x.new_empty(x.numel() // x.shape[-1], dtype=_row_dtype(x)),
            ),
            (save, differentiate),
        )
        self._register(
            "rms_norm_backward",
            "(Tensor normed_gradient, Tensor x, Tensor rstd) -> Tensor",
            lambda *arguments: self._kernels().rms_norm_backward(*arguments),
            lambda _, x, __: x.new_empty(x.shape),
            (save_for_backward, differentiate_backward),
        )

    def _register_qkv_heads(self) -> None:
        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            qkv, value_rows, cos, sin, *ctx.options = inputs
            ctx.value_dtype = None if value_rows is None else value_rows.dtype
            ctx.save_for_backward(qkv if ctx.options[-1] else None, cos, sin)

        def differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
            dqkv = self._ops.qkv_heads_backward(dq, dk, dv, *ctx.saved_tensors, *ctx.options)
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
            x = (
                torch.zeros(shape, dtype=dtype, device=device) if qkv is None else qkv
            )  # without a norm its value is moot
            H, H_kv = ctx.options["n_head"], ctx.options["n_kv_head"]
            D = shape[2] // (H + 2 * H_kv)
            full = tuple(
                x.new_zeros((shape[0], heads, shape[1], D)) if given is None else given
                for heads, given in zip((H, H_kv, H_kv), gradients, strict=True)
            )
            dfull, dx = _second(lambda x: reference.qkv_heads(x, None, cos, sin, **ctx.options), full, x, upstream)
            again = [None if given is None else d for given, d in zip(gradients, dfull, strict=True)]
            return *again, None if qkv is None else dx, *[None] * 5

        self._register(
            "qkv_heads",
            f"(Tensor qkv, Tensor? value_rows, {_HEADS_OPTIONS}) -> (Tensor q, Tensor k, Tensor v)",
            lambda *arguments: self._kernels().qkv_heads_forward(*arguments),
            fake,
            (save, differentiate),
        )
        self._register(
            "qkv_heads_backward",
            f"(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? qkv, {_HEADS_OPTIONS}) -> Tensor",
            lambda *arguments: self._kernels().qkv_heads_backward(*arguments),
            fake_backward,
            (save_for_backward, differentiate_backward),
        )

    def _register_relu_squared(self) -> None:
        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        def differentiate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
            dy, x = ctx.saved_tensors
            return _second(reference.relu_squared, dy, x, upstream)

        self._register(
            "relu_squared",
            "(Tensor x) -> Tensor",
            lambda x: self._kernels().relu_squared_forward(x),
            lambda x: x.new_empty(x.shape),
            (save, lambda ctx, dy: self._ops.relu_squared_backward(dy, *ctx.saved_tensors)),
        )
        self._register(
            "relu_squared_backward",
            "(Tensor gradient, Tensor x) -> Tensor",
            lambda *arguments: self._kernels().relu_squared_backward(*arguments),
            lambda _, x: x.new_empty(x.shape),
            (save, differentiate_backward),
        )


def _second(f: Callable[[Tensor], Any], cotangents: Any, x: Tensor, upstream: Tensor) -> tuple[Any, Tensor]:
    """The gradients, with respect to the cotangents and to x, of f's gradient. Rare: they have no kernel."""

    def gradient(cotangents: Any, x: Tensor) -> Tensor:
        return torch.func.vjp(f, x)[1](cotangents)[0]  # type: ignore[no-any-return]

    return torch.func.vjp(gradient, cotangents, x)[1](upstream)  # type: ignore[no-any-return]
