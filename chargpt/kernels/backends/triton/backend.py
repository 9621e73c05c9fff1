"""The Triton kernels, as functions that take what the references take. The first call imports Triton, not this file."""

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from chargpt.kernels.ops import add_norm, attention, cross_entropy, packed_attention
from chargpt.kernels.ops.common import OperatorLibrary

LONGEST_ROW = 4096  # of channels that a norm holds in registers


@functools.cache
def kernels() -> SimpleNamespace:
    from chargpt.kernels.backends.triton import add_norm, attention, cross_entropy

    return SimpleNamespace(
        causal_attention_forward=attention.causal_attention_forward,
        causal_attention_backward=attention.causal_attention_backward,
        causal_attention_backward_into=attention.causal_attention_backward_into,
        softmax_cross_entropy_forward=cross_entropy.softmax_cross_entropy_forward,
        softmax_cross_entropy_backward=cross_entropy.softmax_cross_entropy_backward,
        scale_=cross_entropy.scale_,
        norm_forward=add_norm.norm_forward,
        norm_backward=add_norm.norm_backward,
        row_dropout=add_norm.row_dropout,
    )


LIBRARY = OperatorLibrary(
    "chargpt_triton",
    "CUDA",
    kernels,
    (attention.OPERATION, packed_attention.OPERATION, cross_entropy.OPERATION, add_norm.OPERATION),
    gradient_in_forward=True,
)


def added_and_normalised(x: Tensor | None, y: Tensor | None, *gains: Tensor | None, **options: Any) -> Any:
    """As the reference of `add_norm`, which computes longer rows; and what torch.compile traces, which fuses it."""
    stream = y if x is None else x
    assert stream is not None
    if torch.compiler.is_compiling() or stream.shape[-1] > LONGEST_ROW:
        return add_norm.reference(x, y, *gains, **options)
    return LIBRARY["add_norm"](x, y, *gains, **options)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {**LIBRARY.functions, "add_norm": added_and_normalised}
