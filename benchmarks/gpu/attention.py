"""Causal attention in bfloat16 over a grid of shapes: ours in CUDA and in Triton against every backend of torch's SDPA.

q, k and v are strided views of one packed projection, as the model makes them. Useful work is the causal half:
2 · B · H · T² · D operations forward, 2.5 times that backward.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.program import Function, Program, Times
from chargpt.kernels import causal_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Shape = tuple[int, int, int, int]  # B, H, T, D
TUNED = 1024  # the shortest T at which Triton's tiles are tuned, which takes seconds for each shape


def grid(dry: bool) -> list[Shape]:
    """16,384 tokens in 2,048 channels, divided in every way. A dry run takes a 64th of T."""
    tokens, channels, shrink = (256, 128, 64) if dry else (16_384, 2048, 1)
    return [
        (tokens // (T // shrink), channels // D, T // shrink, D)
        for T in (256, 512, 1024, 64, 128, 4096)
        for D in (64, 32, 128)
    ]


def main() -> None:
    program = Program(__doc__)
    for shape in grid(program.dry):
        measure(program, shape, tuned=shape[2] >= TUNED)
    program.finish()


def measure(program: Program, shape: Shape, *, dropout_p: float = 0.0, warm: bool = False, tuned: bool = False) -> None:
    """The forward pass alone, then with the gradients of q, k and v.

    warm: time it once more with the inputs in L2, as far as they fit
    tuned: let Triton with tiles chosen by timing them compete too
    """
    B, H, T, D = shape
    qkv = torch.randn(B, T, 3, H, D, dtype=torch.bfloat16, device=program.device)
    upstream = torch.randn(B, T, H, D, dtype=torch.bfloat16, device=program.device).transpose(1, 2)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2))
    useful = 2 * math.prod(shape) * T
    for passes, work in (("forward", useful), ("forward and backward", 3.5 * useful)):
        backward = passes != "forward"
        functions, refused = contenders(program, (q, k, v), upstream, dropout_p, backward=backward)
        if tuned and "triton" in functions and not program.dry:
            functions["triton autotuned"] = autotuned((q, k, v), upstream if backward else None)
        case = f"{shape} {f'dropout {dropout_p} ' if dropout_p else ''}{passes}"
        timers = {case: program.milliseconds}
        if warm and not program.warm:
            timers[f"{case}, warm"] = program.warm_milliseconds
        for name, timer in timers.items():
            times = program.time(name, functions, refused, seconds=0.5, timer=timer)
            if times is not None:
                best = times.best([*BACKENDS])
                ours = [name for name in times.times if name not in BACKENDS]
                program.record(
                    {
                        "case": name,
                        "shape": shape,
                        "dropout_p": dropout_p,
                        "passes": passes,
                        "warm": timer != program.milliseconds,
                        **times.summary(),
                        "tflops": {name: work / (1e9 * times.median(name)) for name in times.times},
                        "best_backend": best,
                        "ratio": ratios(times, best, ours),
                        "ratio_to_flash": ratios(times, "flash", ours),
                    }
                )


def ratios(times: Times, theirs: str | None, ours: list[str]) -> dict[str, float]:
    """By how much each of ours is faster than `theirs`; nothing where that did not run."""
    return {name: times.ratio(theirs, name) for name in ours} if theirs in times.times else {}


def contenders(
    program: Program, qkv: tuple[Tensor, Tensor, Tensor], upstream: Tensor, dropout_p: float, *, backward: bool
) -> tuple[dict[str, Function], dict[str, str]]:
    """By name: what makes one pass, or both. While compiling, only those that have something to compile."""

    def ours(impl: str) -> Function:
        return lambda: causal_attention(*qkv, dropout_p=dropout_p, impl=impl)

    def torchs(backend: SDPBackend) -> Function:
        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*qkv, dropout_p=dropout_p, is_causal=True)

        return attend

    def with_gradients(attend: Function) -> Function:
        return lambda: torch.autograd.grad(attend(), qkv, upstream)

    names, refused = program.ours("causal_attention", upstream.dtype)
    functions = {name: ours(name) for name in names}
    if not program.warm:
        functions |= {name: torchs(backend) for name, backend in BACKENDS.items()}
    wrap = with_gradients if backward else torch.no_grad()
    return {name: wrap(function) for name, function in functions.items()}, refused


def autotuned(qkv: tuple[Tensor, Tensor, Tensor], upstream: Tensor | None) -> Function:
    """Triton's kernels with tiles chosen by timing them, called without autograd; no upstream: the forward alone."""
    from chargpt.kernels.backends.triton.attention import causal_attention_backward, causal_attention_forward

    q, k, v = (x.detach() for x in qkv)
    options = (1 / math.sqrt(q.shape[-1]), 0.0, None, None)  # scale, dropout_p, window, seed

    def attend() -> tuple[Tensor, ...]:
        out, lse = causal_attention_forward(q, k, v, *options, autotune=True)
        if upstream is None:
            return out, lse
        return causal_attention_backward(upstream, None, q, k, v, out, lse, *options, autotune=True)

    return attend


if __name__ == "__main__":
    main()
