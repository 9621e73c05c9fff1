"""A table that embeds tokens and is the head as well, with one gradient that both of its uses add to.

Left to autograd, each use makes a gradient of the table's size, and the embedding's is zero but for the rows of the
tokens that were read. GPT-2 has 50,257 rows of 768 channels, 147 MiB; one window reads 1,024 of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt.kernels.ops.common import is_batched, only_reference


@dataclass
class Tie:
    """What the head of one forward pass multiplies with."""

    table: Tensor | None = None  # (V, C), as the embedding of that pass left it


class TiedEmbedding(nn.Embedding):
    """An embedding whose table the head may share."""

    def forward(self, idx: Tensor, tie: Tie | None = None) -> Tensor:
        """The rows (…, C) of `idx` (…). With `tie` the table is left there, for the head of the same pass."""
        if tie is None:
            return super().forward(idx)
        x, tie.table = _EmbedAndKeep.apply(self.weight, idx)  # type: ignore[no-untyped-call]
        return x  # type: ignore[no-any-return]

    def pays(self, idx: Tensor) -> bool:
        """Whether a `Tie` saves anything: on a CPU, where fewer tokens are read than the table has rows."""
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        usual = not torch.compiler.is_compiling() and not only_reference(self.weight, idx)
        return learns and usual and self.weight.is_cpu and idx.numel() < self.num_embeddings


class _EmbedAndKeep(torch.autograd.Function):
    """Rows of a table, and the table: its gradient comes when those of all its uses are there."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(idx)
        ctx.rows = len(table)
        return F.embedding(idx, table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor | None, of_table: Tensor | None) -> tuple[Tensor | None, None]:
        (idx,) = ctx.saved_tensors
        if of_rows is None:
            return of_table, None
        if of_table is None or torch.is_grad_enabled() or is_batched(of_rows) or is_batched(of_table):
            read = torch.ops.aten.embedding_dense_backward(of_rows, idx, ctx.rows, -1, False)
            return read if of_table is None else read + of_table, None
        return of_table.index_add_(0, idx.flatten(), of_rows.flatten(0, -2)), None  # the head's, of this pass alone
