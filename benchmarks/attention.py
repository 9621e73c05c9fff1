"""Causal attention, forward and backward: the C++ kernel against torch's scaled_dot_product_attention, flash and math.

Run as `python -m benchmarks.attention [--threads 2]`. q, k and v are strided views of one packed projection, as the
model makes them. Useful work, for GF/s, is the causal half: 2 · B · H · T² · D forward, 2.5 times that backward.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Measurement, compare, report
from chargpt.kernels import causal_attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
PEAK = {torch.float32: 118, torch.bfloat16: 236}  # GF/s of one Zen 4 core at 3.7 GHz: one 512-bit operation a cycle


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # B, H, T, D
    dtype: torch.dtype
    forward_goal: str
    goal: str
    dropout_p: float = 0.0
    math: bool = True  # whether torch's math path is timed too: slow on long sequences


CASES = (
    Case((64, 6, 256, 64), torch.float32, "1.8", "2.0"),
    Case((64, 6, 256, 64), torch.bfloat16, "3.5", "3.5"),
    Case((12, 4, 64, 32), torch.float32, "1.5", "2.0"),
    Case((12, 4, 64, 32), torch.bfloat16, "", "2"),
    Case((8, 12, 1024, 64), torch.float32, "1.4", "1.5", math=False),
    Case((8, 12, 1024, 64), torch.bfloat16, "2.8", "2.8", math=False),
    Case((64, 6, 256, 64), torch.float32, "cpp 0.77", "cpp 0.77", dropout_p=0.2),
    Case((64, 6, 256, 64), torch.bfloat16, "cpp 0.77", "cpp 0.77", dropout_p=0.2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    measurements, shares = [], []
    for case in CASES:
        forward, both = measure(case)
        measurements += [forward, both]
        shares += [share_of_peak(case, forward, 1.0), share_of_peak(case, both, 3.5)]
    report("attention", measurements, {"useful work, from the fastest round": "; ".join(shares)})


def measure(case: Case) -> tuple[Measurement, Measurement]:
    """The forward pass alone, then with the gradients of q, k and v."""
    B, H, T, D = case.shape
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(B, T, 3, H, D, generator=generator).to(case.dtype)
    upstream = torch.randn(B, T, H, D, generator=generator).to(case.dtype).transpose(1, 2)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2))

    def cpp(dropout_p: float) -> Callable[[], Tensor]:
        return lambda: causal_attention(q, k, v, dropout_p=dropout_p, impl="cpp")

    def torchs(backend: SDPBackend) -> Callable[[], Tensor]:
        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=case.dropout_p)

        return attend

    functions = {"cpp": cpp(case.dropout_p)}
    if case.dropout_p > 0:
        functions |= {"cpp without dropout": cpp(0.0), "math": torchs(BACKENDS["math"])}
    else:
        functions |= {name: torchs(BACKENDS[name]) for name in ("flash", "math") if name == "flash" or case.math}
    pairs = [(name, "cpp") for name in functions if name != "cpp"]
    dropout = f", dropout {case.dropout_p}" if case.dropout_p > 0 else ""
    name = f"{case.shape} {str(case.dtype).removeprefix('torch.')}{dropout}"

    def with_gradients(attend: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(), (q, k, v), upstream)

    forward = {name: torch.no_grad()(f) for name, f in functions.items()}
    both = {name: with_gradients(f) for name, f in functions.items()}
    return (
        compare(f"forward {name}", forward, pairs, goal=case.forward_goal, seconds=3),
        compare(f"forward and backward {name}", both, pairs, goal=case.goal),
    )


def share_of_peak(case: Case, measured: Measurement, work: float) -> str:
    gflops = work * 2 * math.prod(case.shape) * case.shape[2] / (measured.fastest["cpp"] * 1e6)
    share = gflops / (PEAK[case.dtype] * torch.get_num_threads())
    return f"{measured.case} {gflops:.0f} GF/s ({share:.0%} of Zen 4's peak)"


if __name__ == "__main__":
    main()
