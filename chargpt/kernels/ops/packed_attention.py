"""Causal attention of a packed projection: its gradient is packed too, and no copy joins those of q, k and v.

For heads that are only split: with rotary positions or a norm a pass over q and k follows anyway. C++ for the CPU needs
no operator of its own for it, because its attention and its heads agree about the memory (ops/qkv_heads.py).
"""

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops import attention
from chargpt.kernels.ops.attention import MAX_HEAD_SIZE, causal_attention
from chargpt.kernels.ops.common import Operation, OperatorLibrary, computing_dtype, only_reference, second_derivative
from chargpt.kernels.ops.qkv_heads import check_packed, qkv_heads

NAME = "packed_causal_attention"
OPTIONS = "int n_head, int n_kv_head, float scale, float dropout_p, Tensor? seed"


def packed_causal_attention(
    qkv: Tensor,
    *,
    n_head: int,
    n_kv_head: int,
    dropout_p: float = 0.0,
    generator: Generator | None = None,
    impl: str = "auto",
) -> Tensor:
    """`causal_attention` of the heads that `qkv_heads` splits off, side by side again.

    qkv: (B, T, (H + 2 H_kv) D), floating: the heads of q, then of k, then of v; any strides
    n_head, n_kv_head: H and H_kv
    dropout_p, generator, impl: as in `causal_attention`, and the same mask
    returns: (B, T, H D), in the dtype of qkv

    Raises what these two raise.
    """
    check_packed(qkv, n_head, n_kv_head)
    backend = registry.BACKENDS[registry.choose("causal_attention", qkv.device.type, qkv.dtype, impl)]
    packed = backend.functions.get(NAME)
    if packed is None or only_reference(qkv) or qkv.shape[-1] > MAX_HEAD_SIZE * (n_head + 2 * n_kv_head):
        q, k, v = qkv_heads(qkv, n_head=n_head, n_kv_head=n_kv_head, qk_norm=False, impl=impl)
        out = causal_attention(q, k, v, dropout_p=dropout_p, generator=generator, impl=impl)
    else:
        q, k, v = split(qkv.detach(), n_head, n_kv_head)
        attention.check(q, k, v, dropout_p, None)
        dropout_p, seed = attention.drawn_seed(dropout_p, generator, qkv.device)
        scale = attention.usual_scale(q)
        out = packed(qkv, n_head=n_head, n_kv_head=n_kv_head, scale=scale, dropout_p=dropout_p, seed=seed)
    return out.transpose(1, 2).flatten(2)


def split(qkv: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: q (B, H, T, D), k and v (B, H_kv, T, D)."""
    B, T, channels = qkv.shape
    count = n_head + 2 * n_kv_head
    heads = qkv.view(B, T, count, channels // count).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
    q, k, v = heads.split([n_head, n_kv_head, n_kv_head], dim=1)  # type: ignore[no-untyped-call]
    return q, k, v


def reference(
    qkv: Tensor, *, n_head: int, n_kv_head: int, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Attention's reference, of views: (B, H, T, D)."""
    q, k, v = split(qkv, n_head, n_kv_head)
    options: Any = {"scale": scale, "dropout_p": dropout_p, "window": None, "seed": seed}
    return attention.reference(q, k, v, **options, return_lse=False)  # type: ignore[return-value]


def register(library: OperatorLibrary) -> Any:
    """Operators over the kernels

    - `causal_attention_forward(q, k, v, scale, dropout_p, window, seed) -> O, lse`,
    - `causal_attention_backward_into(dq, dk, dv, dO, q, k, v, O, lse, scale, dropout_p, window, seed)`, which writes to
      dq, dk and dv, of any strides.
    """

    def forward(qkv: Tensor, H: int, H_kv: int, scale: float, dropout_p: float, seed: Tensor | None) -> Any:
        arguments = (*split(qkv, H, H_kv), scale, dropout_p, None, seed)
        return attention.call(library, "causal_attention_forward", *arguments)

    def backward(
        dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor,
        H: int, H_kv: int, scale: float, dropout_p: float, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        dqkv = qkv.new_empty(qkv.shape)
        arguments = (dout, *split(qkv, H, H_kv), out, lse, scale, dropout_p, None, seed)
        attention.call(library, "causal_attention_backward_into", *split(dqkv, H, H_kv), *arguments)
        return dqkv

    def fake(qkv: Tensor, H: int, H_kv: int, *_: Any) -> tuple[Tensor, Tensor]:
        B, T, channels = qkv.shape
        out = qkv.new_empty((B, T, H, channels // (H + 2 * H_kv))).transpose(1, 2)
        return out, qkv.new_empty((B, H, T), dtype=computing_dtype(qkv))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, *ctx.options, seed = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, *output, seed)

    def differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        if dout is None:
            return (None,) * 6
        return library.ops.packed_causal_attention_backward(dout, *tensors, *ctx.options, seed), *[None] * 5

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dout, qkv, _, _, *ctx.options, seed = inputs
        ctx.save_for_backward(dout, qkv, seed)

    def differentiate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dout, qkv, seed = ctx.saved_tensors
        options: Any = dict(zip(("n_head", "n_kv_head", "scale", "dropout_p"), ctx.options, strict=True))
        again = second_derivative(lambda qkv: reference(qkv, **options, seed=seed), dout, qkv, upstream)
        return *again, *[None] * 7

    def product_flops(qkv: Sequence[int], H: int, H_kv: int) -> int:
        B, T, channels = qkv
        return 2 * B * H * T * T * (channels // (H + 2 * H_kv))

    library.define(
        NAME,
        f"(Tensor qkv, {OPTIONS}) -> (Tensor out, Tensor lse)",
        forward,
        fake,
        (save, differentiate),
        lambda qkv, H, H_kv, *_, **__: 2 * product_flops(qkv, H, H_kv),
    )
    library.define(
        f"{NAME}_backward",
        f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {OPTIONS}) -> Tensor",
        backward,
        lambda _, qkv, *__: qkv.new_empty(qkv.shape),
        (save_for_backward, differentiate_backward),
        lambda _, qkv, __, ___, H, H_kv, *____, **_____: 5 * product_flops(qkv, H, H_kv),
    )

    def attend(
        qkv: Tensor, *, n_head: int, n_kv_head: int, scale: float, dropout_p: float, seed: Tensor | None
    ) -> Tensor:
        """As `reference`."""
        library.count_flops()
        out, _ = library.ops.packed_causal_attention(qkv, n_head, n_kv_head, scale, dropout_p, seed)
        return out  # type: ignore[no-any-return]

    return attend


OPERATION = Operation(NAME, reference, register, small=True)
