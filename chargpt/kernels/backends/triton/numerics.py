"""Arithmetic that both kernel files share, and what Triton's interpreter needs to round as a GPU does.

The interpreter keeps bfloat16 as raw 16-bit words: its `tl.dot` multiplies those words as integers, and its conversion
from float32 cuts the low half off. So products and conversions go through `dot` and `narrow`, which are plain on a GPU:
`INTERPRETED` is a compile-time constant, and the other branch leaves nothing behind.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-any-return"

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, sum):
    """sum + a b, accumulated in float32. float32 operands are multiplied as such, never rounded to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)  # a NaN stays one
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def rounded_product(a, b):
    """a b in float32, rounded: an explicit multiply-add, so that the compiler cannot fuse the product with a sum."""
    return tl.fma(a, b, 0.0)


@triton.jit
def exp_of_scores(s, scale, shift, dtype: tl.constexpr):
    """exp(scale · s − shift) for products s of operands in dtype.

    For 16 bits it is one multiply-add and one base 2 exponential, which is what the hardware has. For float32 the score
    is rounded first: the maximum of a row and its lse were made from rounded scores, and where one key has nearly all
    the weight, its distance to them must be as exact as they are.
    """
    if dtype == tl.float32:
        return tl.exp(rounded_product(s, scale) - shift)
    else:
        return tl.exp2(tl.fma(s, scale * LOG2_E, -shift * LOG2_E))


@triton.jit
def tanh(u):
    """tanh(u), to some 2 units in the last place, and its derivative, 1 − tanh², without that cancellation.

    Near 0, (1 − e) / (1 + e) would cancel too: there an odd polynomial.
    """
    square = u * u
    p = -5.70498872745e-3
    p = p * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = p * square * u + u
    e = tl.exp(-2.0 * tl.abs(u))
    size = (1.0 - e) / (1.0 + e)
    value = tl.where(tl.abs(u) < 0.625, near, tl.where(u < 0, -size, size))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))
