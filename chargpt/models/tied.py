"""A table that embeds tokens and is the head as well, without a second gradient of its size.

Left to autograd, each use makes a gradient as large as the table, and the embedding's is zero but for the rows of the
tokens that were read. GPT-2 has 50,257 rows of 768 channels, 147 MiB; one window reads 1,024 of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from chargpt.kernels.ops.common import is_batched, only_reference


def embed_and_keep(table: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (…, C) of a table (V, C) for `idx` (…), and the table for the head of the same pass.

    Autograd adds the gradient of each row that was read to the head's gradient, in place if nobody else holds that.
    """
    return _EmbedAndKeep.apply(table, table, idx)  # type: ignore[no-untyped-call, no-any-return]


def pays(embedding: nn.Module, idx: Tensor) -> bool:
    """Whether `embed_and_keep` is what the embedding would do, and saves something: on a CPU, where fewer tokens are
    read than the table has rows.
    """
    if type(embedding) is not nn.Embedding or getattr(embedding.forward, "__func__", None) is not nn.Embedding.forward:
        return False
    forward, backward = embedding._forward_hooks, embedding._backward_hooks
    hooked = forward or backward or embedding._forward_pre_hooks or embedding._backward_pre_hooks
    if hooked or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    limited = embedding.max_norm is not None or embedding.padding_idx is not None
    if limited or embedding.scale_grad_by_freq or embedding.sparse:
        return False
    table = embedding.weight
    learns = torch.is_grad_enabled() and table.requires_grad
    usual = not torch.compiler.is_compiling() and not only_reference(table, idx)
    return learns and usual and table.is_cpu and idx.numel() < len(table)


class _EmbedAndKeep(torch.autograd.Function):
    """Takes the table twice, so that autograd gets two gradients, and adds them up by its own rules."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, _: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(idx)
        ctx.shape = table.shape
        return F.embedding(idx, table), table.view_as(table)

    @staticmethod
    def backward(
        ctx: Any, of_rows: Tensor | None, of_table: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        (idx,) = ctx.saved_tensors
        if of_rows is None:
            return None, of_table, None
        plain = type(of_rows) is type(of_table) is Tensor and not is_batched(of_rows) and not is_batched(of_table)
        if plain and not torch.is_grad_enabled():
            rows = torch.sparse_coo_tensor(
                idx.flatten()[None], of_rows.flatten(0, -2), ctx.shape, check_invariants=False
            )
            return rows.coalesce(), of_table, None  # in this order: a sparse one takes the dense one in
        return torch.ops.aten.embedding_dense_backward(of_rows, idx, ctx.shape[0], -1, False), of_table, None
