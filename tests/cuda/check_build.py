"""What `make cuda-build` asks of the CUDA kernels that it has built and installed; no GPU is needed.

The module loads and takes the arguments that it will be called with; it has machine code for every architecture that it
was built for; each operator is registered and passes its fake-tensor checks, gradients and torch.compile included.
Run as a script, with the Python that has chargpt installed, so that the source tree is not imported. pytest does not
collect this file.
"""

import re
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import chargpt
from chargpt.kernels import describe_backends, native
from chargpt.kernels.backends import cuda
from chargpt.kernels.backends.triton import backend as triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION = (0.5, 0.25, 3, torch.tensor(7))  # scale, dropout_p, window, seed
CROSS_ENTROPY = (-100, 0.1, 0.01, 5.0)  # ignore_index, label_smoothing, z_loss, softcap; then the reduction
B, H, H_kv, T, S, D, N, V = 2, 4, 2, 5, 9, 32, 6, 65


def main() -> None:
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, chargpt in {Path(chargpt.__file__).parent}")
    for name, state in describe_backends().items():
        print(f"  {name:<7} {state}")
    assert native.load().module is not None, native.load().problem
    module = native.load_cuda().module
    assert module is not None, native.load_cuda().problem
    checks: list[tuple[str, Callable[[], object]]] = [
        ("the binding takes the operators' arguments", lambda: check_binding(module)),
        ("machine code and PTX", lambda: check_code(Path(module.__file__))),
    ]
    for namespace, operators in (("chargpt_cuda", cuda.LIBRARY), ("chargpt_triton", triton.LIBRARY)):
        checks += [
            (f"{namespace}: registered, as for the CPU", lambda n=namespace: check_registration(n)),
            (f"{namespace}: attention on fake tensors", lambda n=namespace, o=operators: check_attention(n, o)),
            (f"{namespace}: cross-entropy on fake tensors", lambda n=namespace, o=operators: check_cross_entropy(n, o)),
            (f"{namespace}: one graph in torch.compile", lambda o=operators: check_compile(o)),
        ]
    for title, check in checks:
        print(f"{title}: {check()}")


def attention_inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, D))
    return tuple(torch.empty(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)  # type: ignore


def cross_entropy_inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    targets = torch.zeros(N, device=device, dtype=torch.int64)
    return torch.empty(N, V, device=device, dtype=dtype, requires_grad=True), targets


def check_binding(module: Any) -> str:
    """Tensors on the CPU get as far as the choice of the GPU. By then pybind11 has taken all arguments."""
    q, k, v = (x.detach() for x in attention_inputs("cpu"))
    logits, targets = (x.detach() for x in cross_entropy_inputs("cpu"))
    out, lse, normalisers = torch.empty_like(q), torch.empty(B, H, T), torch.empty(2, N)
    calls = {
        "causal_attention_forward": (q, k, v, *ATTENTION),
        "causal_attention_backward": (out, None, q, k, v, out, lse, *ATTENTION),
        "causal_attention_backward_into": (q, k, v, out, q, k, v, out, lse, *ATTENTION),
        "softmax_cross_entropy_forward": (logits, targets, *CROSS_ENTROPY, "mean", True),
        "softmax_cross_entropy_backward": (torch.empty(()), logits, targets, normalisers, *CROSS_ENTROPY, "sum"),
        "scale_": (logits, torch.empty(())),
    }
    for name, arguments in calls.items():
        try:
            getattr(module, name)(*arguments)
            said = "nothing"
        except RuntimeError as error:
            said = str(error)
        assert "non-CUDA" in said, f"{name}: {said}"
    return f"{len(calls)} functions"


def check_code(library: Path) -> str:
    """Every file of kernels is there for each architecture of setup.py's default, and as PTX for the newest."""
    tool = files("triton") / "backends/nvidia/bin/cuobjdump"
    listed = [
        subprocess.run([str(tool), option, str(library)], check=True, capture_output=True, text=True).stdout
        for option in ("--list-elf", "--list-ptx")
    ]
    cubins, ptx = (re.findall(r"\.(sm_\d+)\.", text) for text in listed)
    counts = {f"{arch} machine code": cubins.count(arch) for arch in ("sm_80", "sm_90")}
    counts |= {"sm_90 PTX": ptx.count("sm_90")}
    sources = len(list(Path("csrc/cuda").glob("*.cu")))
    assert set(counts.values()) == {sources}, f"{counts} of {sources} files"
    return f"{', '.join(counts)} of {sources} files, {library.stat().st_size / 2**20:.1f} MiB"


def check_registration(namespace: str) -> str:
    """The schemas are those of the C++ kernels' operators, which `make test` checks with real tensors."""
    names = ("causal_attention", "softmax_cross_entropy")
    names = (*names, *(f"{name}_backward" for name in names))
    for name in names:
        ours, theirs = (str(getattr(getattr(torch.ops, n), name).default._schema) for n in (namespace, "chargpt"))
        assert ours.replace(f"{namespace}::", "chargpt::") == theirs
    extra = ("softmax_cross_entropy_with_gradient", "scale_")
    for name in (*names, *extra):
        keys = ("CUDA", "Meta") if name in extra else ("CUDA", "Meta", "Autograd")
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key), (name, key)
    return f"{len(names) + len(extra)} operators"


def assert_like(got: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """On the GPU, and laid out as `expected`: over (B, T, H, D) memory if it has four dimensions."""
    if expected.dim() == 4:
        expected = expected.transpose(1, 2).contiguous().transpose(1, 2)
    assert got.device.type == "cuda"
    assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), dtype or expected.dtype)


def gradients(output: Tensor, *upstream: Tensor | None) -> tuple[Tensor, ...]:
    """What the output's node in the graph gives to its inputs. autograd's engine would want a GPU; its nodes do not."""
    assert output.grad_fn is not None
    with torch.no_grad():
        found = output.grad_fn.apply(*upstream)  # type: ignore[attr-defined]
    return tuple(x for x in (found if isinstance(found, tuple) else (found,)) if x is not None)


def check_attention(namespace: str, operators: Any) -> str:
    names = dict(zip(("scale", "dropout_p", "window", "seed"), ATTENTION, strict=True))
    for dtype in DTYPES:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = attention_inputs("cuda", dtype)
            out, lse = operators["causal_attention"](*inputs, **names, return_lse=True)
            assert_like(out, inputs[0])
            assert_like(lse, inputs[0][..., 0].contiguous(), torch.float32)
            for upstream in ((out, lse), (out, None), (None, lse)):
                for gradient, x in zip(gradients(out, *upstream), inputs, strict=True):
                    assert_like(gradient, x)
    return "O, lse, dQ, dK, dV in " + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def check_cross_entropy(namespace: str, operators: Any) -> str:
    names = dict(zip(("ignore_index", "label_smoothing", "z_loss", "softcap"), CROSS_ENTROPY, strict=True))
    for dtype in DTYPES:
        for reduction in ("none", "sum", "mean"):
            with FakeTensorMode():
                logits, targets = cross_entropy_inputs("cuda", dtype)
                loss = operators["softmax_cross_entropy"](logits, targets, **names, reduction=reduction)
                assert_like(loss, logits[:, 0].contiguous() if reduction == "none" else logits[0, 0], torch.float32)
                kept = type(loss.grad_fn).__name__ == "_GradientInForwardBackward"
                assert kept == (reduction != "none" and dtype != torch.float16)
                (gradient,) = gradients(loss, loss) if kept else gradients(loss, loss, None)
                assert_like(gradient, logits)
    return "loss and gradient, computed in the forward or later, in the same dtypes"


def check_compile(operators: Any) -> str:
    def both(q: Tensor, k: Tensor, v: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = operators["causal_attention"](q, k, v, scale=1.0, dropout_p=0.0, window=None, seed=None, return_lse=False)
        return out, operators["softmax_cross_entropy"](
            logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"
        )

    with FakeTensorMode(), torch.no_grad():
        inputs = (*attention_inputs("cuda", torch.bfloat16), *cross_entropy_inputs("cuda", torch.bfloat16))
        out, loss = torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs)
        assert_like(out, inputs[0])
        assert_like(loss, inputs[3][0, 0], torch.float32)
    return "forward"


if __name__ == "__main__":
    main()
