"""The Triton kernels behind the operators that a GPU will see, under Triton's interpreter on the CPU.

The kernels themselves are tested elsewhere. Here it is the seam: order of arguments, strides of outputs, autograd.
Triton decides at import whether it interprets, so the tests run in a process of their own, where this file is started
again with TRITON_INTERPRET=1.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import Tensor

from chargpt.kernels.backends.triton import backend as triton_backend
from chargpt.kernels.ops import OPERATIONS
from chargpt.kernels.ops.attention import reference as reference_attention
from chargpt.kernels.ops.common import OperatorLibrary
from chargpt.kernels.ops.cross_entropy import reference as reference_cross_entropy

from .cases import ALL_OPTIONS, AttentionCase, CrossEntropyCase

triton = pytest.importorskip("triton")
if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
    pytest.skip("the interpreter of Triton before 3.7 does not work with numpy from 2.4 on", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the first test starts")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_that_interprets() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


FUSED = (OPERATIONS["causal_attention"], OPERATIONS["softmax_cross_entropy"])


@pytest.fixture(scope="module")
def operators() -> OperatorLibrary:
    return OperatorLibrary("chargpt_triton_on_cpu", "CPU", triton_backend.kernels, FUSED, gradient_in_forward=True)


ATTENTION = [
    AttentionCase("more_keys", B=1, T=5, S=20, D=16, H=4, H_kv=2, options={"window": 9, "scale": 0.3}),
    AttentionCase("dropout", B=1, T=7, D=31, packed=True, options={"dropout_p": 0.3}),
    AttentionCase("no_queries", T=0, S=3),
]


@interpreted
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_and_its_gradients(operators: OperatorLibrary, case: AttentionCase) -> None:
    inputs = case.inputs(torch.float32)
    options: dict[str, Any] = {"scale": 0.4, "dropout_p": 0.0, "window": None} | case.options
    options |= {"seed": torch.tensor(5) if options["dropout_p"] else None, "return_lse": True}
    got, expected = operators["causal_attention"](*inputs, **options), reference_attention(*inputs, **options)
    torch.testing.assert_close(got, expected)
    upstream = [torch.randn_like(x) for x in got]
    ours, theirs = (torch.autograd.grad(x, inputs, upstream, materialize_grads=True) for x in (got, expected))
    torch.testing.assert_close(ours, theirs)


@interpreted
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "everything"])
def test_the_loss_and_its_gradient(operators: OperatorLibrary, options: dict[str, float], reduction: str) -> None:
    logits, targets = CrossEntropyCase("seam", shape=(3, 4), V=65, ignored=0.2).inputs(torch.float32)
    named: Any = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None} | options
    got = operators["softmax_cross_entropy"](logits, targets, **named, reduction=reduction)
    expected = reference_cross_entropy(logits, targets, **named, reduction=reduction)
    torch.testing.assert_close(got, expected)
    upstream = torch.linspace(0.5, 2, got.numel()).reshape(got.shape)
    for _ in range(2):  # the first is the forward's gradient, the second is computed from the logits
        ours, theirs = (torch.autograd.grad(x, logits, upstream, retain_graph=True)[0] for x in (got, expected))
        torch.testing.assert_close(ours, theirs)


@interpreted
def test_opcheck(operators: OperatorLibrary) -> None:
    ops = torch.ops.chargpt_triton_on_cpu

    def check(operator: Any, *arguments: Any) -> Any:
        torch.library.opcheck(operator.default, arguments)
        return operator(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))

    q, k, v = AttentionCase("opcheck", B=1, T=5, S=9, H=4, H_kv=2, D=16).inputs(torch.float32)
    options: tuple[Any, ...] = (0.5, 0.3, 3, torch.tensor(7))
    out, lse = check(ops.causal_attention, q, k, v, *options)
    q, k, v = q.detach(), k.detach(), v.detach()
    check(ops.causal_attention_backward, torch.ones_like(out), None, q, k, v, out, lse, *options)

    logits, targets = CrossEntropyCase("opcheck", shape=(2, 3), V=7).inputs(torch.float32)
    options = (-100, 0.1, 0.01, 5.0, "mean")
    loss, normalisers = check(ops.softmax_cross_entropy, logits, targets, *options)
    logits = logits.detach()
    check(ops.softmax_cross_entropy_backward, torch.ones_like(loss), logits, targets, normalisers, *options)
    check(ops.softmax_cross_entropy_with_gradient, logits, targets, *options)
    check(ops.scale_, logits, torch.tensor(2.0))
