"""The addition to the residual stream, the branch's dropout, and the norm in one: the public function, its reference,
and its operators.

torch.compile and torch.func get the reference, which they can look into.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.common import Operation, OperatorLibrary, computing_dtype, only_reference, shape_of
from chargpt.kernels.philox import UNIT, row_keep_mask

NORMS = ("none", "layernorm", "rmsnorm")  # Norm in csrc/cpu/parts.h has their numbers
RMS_EPS = 1e-6  # added to the mean square of a row before it divides
LAYER_EPS = 1e-5  # to the variance
_HALVES = (torch.bfloat16, torch.float16)


def add_norm(
    x: Tensor | None,
    y: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str,
    dropout_p: float = 0.0,
    generator: Generator | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch, after its dropout, to the residual stream and normalise the sum: s = x + dropout(y) and norm(s).

    x: (..., C), floating; any strides; None: y takes its place
    y: as x, in its dtype, bfloat16 or float16; None: nothing is added, and the first result is x itself
    weight, bias: (C,), floating; None: 1 and 0; no bias without a weight
    norm: over the last axis. "rmsnorm": s / sqrt(mean(s²) + 10⁻⁶) · weight + bias (Zhang & Sennrich 2019, arXiv
        1910.07467, equation 4); "layernorm": (s − mean(s)) / sqrt(var(s) + 10⁻⁵) · weight + bias (Ba et al. 2016, arXiv
        1607.06450); "none": s itself
    dropout_p: probability in [0, 1) that an element of y becomes 0, rounded down to a multiple of 2⁻¹⁶; the others grow
        by 1 / (1 − p)
    generator: what dropout draws its 64-bit seed from, as for `causal_attention`; the mask is a function of that seed,
        of the row and of the channel (`philox.row_keep_mask`). Nothing is drawn when dropout_p is 0.
    impl: "auto", or the name of an implementation; "cuda" has no such kernel and means the reference
    returns: s in the dtype of x; the norm, computed in float32 (float64 for float64), in the autocast region's dtype
        where there is one and x is not float64, else in the dtype of x

    Raises ValueError for tensors that do not fit together, ConfigError when `impl` cannot run.
    """
    dropout_p = math.floor(dropout_p * UNIT) / UNIT if 0 <= dropout_p < 1 else dropout_p
    if x is None and y is not None and dropout_p == 0:
        x, y = y, None
    stream = _check(x, y, weight, bias, norm, dropout_p)
    seed = None
    if dropout_p > 0 and y is not None:
        if generator is not None and generator.device not in (torch.device("cpu"), stream.device):
            raise ValueError(f"the generator must be of the CPU or of {stream.device}, got one of {generator.device}")
        device = stream.device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
    in_region = torch.is_autocast_enabled(stream.device.type) and stream.dtype != torch.float64
    dtype = torch.get_autocast_dtype(stream.device.type) if in_region else stream.dtype
    chosen = registry.function("add_norm", stream.device.type, stream.dtype, impl)
    return chosen(x, y, weight, bias, norm=norm, dropout_p=dropout_p, seed=seed, dtype=dtype)  # type: ignore[no-any-return]


def _check(
    x: Tensor | None, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str, dropout_p: float
) -> Tensor:
    """x, or what stands in its place."""
    stream = y if x is None else x
    if stream is None:
        raise ValueError("x or y must be given")
    if stream.dim() == 0 or stream.shape[-1] == 0:
        raise ValueError(f"x must be (..., C) with C at least 1, got {shape_of(stream)}")
    if not stream.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {stream.dtype}")
    if y is not None:
        if y.shape != stream.shape:
            raise ValueError(f"x and y must have one shape, got {shape_of(stream)} and {shape_of(y)}")
        if y.dtype != stream.dtype and y.dtype not in _HALVES:
            raise ValueError(f"y must have the dtype of x, bfloat16 or float16, got {y.dtype} beside {stream.dtype}")
        if y.device != stream.device:
            raise ValueError(f"x and y must be on one device, got {stream.device} and {y.device}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if bias is not None and weight is None:
        raise ValueError("a bias needs a weight beside it")
    if weight is not None and norm == "none":
        raise ValueError("a weight needs a norm")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is None:
            continue
        if given.shape != stream.shape[-1:] or not given.dtype.is_floating_point:
            wanted = f"floating {tuple(stream.shape[-1:])}"
            raise ValueError(f"{name} must be {wanted}, got {given.dtype} {shape_of(given)}")
        if given.device != stream.device:
            raise ValueError(f"x and {name} must be on one device, got {stream.device} and {given.device}")
    return stream


# ------------------------------------------------------------------------------------------------------------ reference


def reference(
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm: str,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """s = x + dropout(y), and its norm over the last axis.

    x, y: (..., C); seed: int64 scalar that fixes the mask, as `philox.row_keep_mask` says; None: no dropout
    returns: s in the dtype of x, rounded before it is normalised; the norm in `dtype`, computed in the computing dtype
    """
    stream = y if x is None else x
    assert stream is not None
    with torch.autocast(stream.device.type, enabled=False):
        if y is not None and seed is not None:
            y = row_dropout(y.to(computing_dtype(stream)), dropout_p, seed)
        s = added(x, y, stream.dtype)
        return s, s if norm == "none" else normalised(s, weight, bias, norm, dtype)


def row_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout of x (..., C) by the numbers of its rows and channels."""
    C = x.shape[-1]
    keep = row_keep_mask(seed, p, x.numel() // C, C, x.device).view(x.shape)
    return torch.where(keep, x * (1 / (1 - p)), 0.0)


def added(x: Tensor | None, y: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x + y in a dtype; without y, x itself."""
    if x is not None and y is None:
        return x
    assert y is not None
    return (y if x is None else x + y).to(dtype)


def normalised(s: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, dtype: torch.dtype) -> Tensor:
    """The norm of s (..., C) in `dtype`, computed in the computing dtype."""
    computing = computing_dtype(s)
    wide, shape = s.to(computing), s.shape[-1:]
    weight = None if weight is None else weight.to(computing)
    bias = None if bias is None else bias.to(computing)
    if norm == "layernorm":
        return F.layer_norm(wide, shape, weight, bias, LAYER_EPS).to(dtype)
    n = F.rms_norm(wide, shape, weight, RMS_EPS)
    return (n if bias is None else n + bias).to(dtype)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) over the last axis, in the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


# ------------------------------------------------------------------------------------------------------------ operators


def register(library: OperatorLibrary) -> Any:
    """Operators over the kernels `norm_forward(x, weight, bias, norm, dtype) -> normed, statistics`,
    `norm_backward(dnormed, x, weight, bias, statistics, norm) -> dx, dweight, dbias` and `row_dropout(x, p, seed)`.

    `norm` is a number of NORMS, `statistics` (2, rows) of mean and 1 / deviation; what has no gradient is (0,).
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, ctx.norm, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, bias, output[1])

    def differentiate(ctx: Any, dnormed: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        dx, dweight, dbias = library.ops.norm_backward(dnormed, x, weight, bias, statistics, ctx.norm)
        return dx, None if weight is None else dweight, None if bias is None else dbias, None, None

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        dnormed, x, weight, ctx.bias, _, ctx.norm = inputs
        ctx.bias = ctx.bias is not None
        ctx.save_for_backward(dnormed, x, weight)

    def differentiate_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        dnormed, x, weight = ctx.saved_tensors
        given = (x,) if weight is None else (x, weight)

        def gradients(dnormed: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
                return normalised(x, weight, None, NORMS[ctx.norm], dnormed.dtype)

            found = torch.func.vjp(norm, *given)[1](dnormed)
            return (*found, dnormed.flatten(0, -2).sum(0).to(given[-1].dtype)) if ctx.bias else found

        count = len(given) + ctx.bias
        found = torch.func.vjp(gradients, dnormed, *given)[1](upstream[:count])
        return *found, *([None] * (6 - len(found)))

    library.define(
        "norm",
        "(Tensor x, Tensor? weight, Tensor? bias, int norm, ScalarType dtype) -> (Tensor normed, Tensor statistics)",
        lambda *arguments: library.kernels().norm_forward(*arguments),
        lambda x, weight, bias, norm, dtype: (
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(2, x.numel() // x.shape[-1], dtype=computing_dtype(x)),
        ),
        (save, differentiate),
    )
    library.define(
        "norm_backward",
        "(Tensor normed_gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, int norm)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        lambda *arguments: library.kernels().norm_backward(*arguments),
        lambda _, x, weight, bias, *rest: (
            x.new_empty(x.shape),
            *(x.new_empty(0) if given is None else given.new_empty(given.shape) for given in (weight, bias)),
        ),
        (save_for_backward, differentiate_backward),
    )

    def save_seed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.p, seed = inputs
        ctx.save_for_backward(seed)

    library.define(
        "row_dropout",
        "(Tensor x, float p, Tensor seed) -> Tensor",
        lambda *arguments: library.kernels().row_dropout(*arguments),
        lambda x, p, seed: x.new_empty(x.shape),
        (save_seed, lambda ctx, dy: (library.ops.row_dropout(dy, ctx.p, *ctx.saved_tensors), None, None)),
    )

    def add(
        x: Tensor | None,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        norm: str,
        dropout_p: float,
        seed: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """As `reference`. The addition is torch's: an operator must not return its argument x."""
        if only_reference(x, y, weight, bias, seed):
            return reference(x, y, weight, bias, norm=norm, dropout_p=dropout_p, seed=seed, dtype=dtype)
        stream = y if x is None else x
        assert stream is not None
        if y is not None and seed is not None:
            y = library.ops.row_dropout(y.to(computing_dtype(stream)), dropout_p, seed)
        s = added(x, y, stream.dtype)
        return s, s if norm == "none" else library.ops.norm(s, weight, bias, NORMS.index(norm), dtype)[0]

    return add


OPERATION = Operation("add_norm", reference, register, small=True)
