"""The head's loss in parts, against the loss of all its logits."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from chargpt.kernels import linear_cross_entropy, softmax_cross_entropy
from chargpt.kernels.ops import linear_cross_entropy as module

from .cases import DRAWS, assert_as_right_as_torch, implementations, naive_cross_entropy

IMPLEMENTATIONS = implementations("softmax_cross_entropy")
SHAPES = [(1, 1, 1), (7, 1, 5), (7, 3, 5), (13, 8, 65), (20, 16, 300)]  # N, C, V
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0},
    {"ignore_index": 0, "reduction": "sum", "label_smoothing": 0.3},
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of logits at a time, of any vocabulary, and slices of the gradient of a few rows."""
    monkeypatch.setattr(module, "_rows", lambda device, V, dtype: 3)
    monkeypatch.setattr(module, "SLICE_BYTES", 64)


def head(
    N: int, C: int, V: int, dtype: torch.dtype = torch.float64, draw: int = 0, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """h (N, C), weight (V, C), targets (N,) of which each fifth is ignored, bias (V,)."""
    generator = torch.Generator().manual_seed(draw)
    h, weight, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, C), (V, C), (V,)))
    targets = torch.randint(V, (N,), generator=generator)
    targets[4::5] = -100
    h, weight, b = (x.to(dtype).requires_grad_() for x in (h, weight, b))
    return h, weight, targets, b if bias else None


def gradients(loss: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad(loss, [x for x in inputs if x is not None], upstream)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float64_is_the_naive_twin_of_all_logits(
    impl: str, shape: tuple[int, int, int], bias: bool, options: dict[str, Any]
) -> None:
    h, weight, targets, b = head(*shape, bias=bias)
    targets = torch.where(targets == -100, options.get("ignore_index", -100), targets)
    got = linear_cross_entropy(h, weight, targets, b, impl=impl, **options)
    truth = naive_cross_entropy(F.linear(h, weight, b), targets, **options)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)
    for x, y in zip(gradients(got, h, weight, b), gradients(truth, h, weight, b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        alone = linear_cross_entropy(h, weight, targets, b, impl=impl, **options)
    torch.testing.assert_close(alone, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_loses_no_more_than_torch(dtype: torch.dtype, autocast: bool) -> None:
    draws = []
    for draw in DRAWS:
        h, weight, targets, b = head(20, 16, 300, dtype, draw)
        exact = [None if x is None else x.detach().double().requires_grad_() for x in (h, weight, b)]
        truth = naive_cross_entropy(F.linear(exact[0], exact[1], exact[2]), targets)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = linear_cross_entropy(h, weight, targets, b, impl="auto")
            plain = F.cross_entropy(F.linear(h, weight, b).float(), targets)
        assert got.dtype == torch.float32
        ours, theirs = gradients(got, h, weight, b), gradients(plain, h, weight, b)
        triples = zip((got, *ours), (truth, *gradients(truth, *exact)), (plain, *theirs), strict=True)
        draws.append(list(triples))
    for name, column in zip(("loss", "dh", "dweight", "dbias"), zip(*draws, strict=True), strict=True):
        assert_as_right_as_torch(name, list(column))


def test_autocast_leaves_float64_alone() -> None:
    h, weight, targets, b = head(13, 8, 65)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(h, weight, targets, b)
        whole = softmax_cross_entropy(F.linear(h, weight, b), targets)
    assert got.dtype == whole.dtype == torch.float64
    torch.testing.assert_close(got, whole)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_needs_no_gradient_gets_none(impl: str) -> None:
    h, weight, targets, b = head(13, 8, 65)
    assert b is not None
    whole = gradients(linear_cross_entropy(h, weight, targets, b, impl=impl), h, weight, b)
    for wanted in ((h,), (weight,), (b,), (h, b)):
        for x in (h, weight, b):
            x.requires_grad_(any(x is one for one in wanted))
        found = gradients(linear_cross_entropy(h, weight, targets, b, impl=impl), *wanted)
        expected = [x for x, one in zip(whole, (h, weight, b), strict=True) if one.requires_grad]
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_second_walk_through_the_graph_gives_the_same(impl: str) -> None:
    h, weight, targets, b = head(13, 8, 65)
    loss = linear_cross_entropy(h, weight, targets, b, impl=impl)
    first = [x.clone() for x in torch.autograd.grad(3 * loss, (h, weight), retain_graph=True)]
    second = torch.autograd.grad(3 * loss, (h, weight))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "softcap": 2.0}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl: str, options: dict[str, Any]) -> None:
    h, weight, targets, b = head(5, 3, 4)
    assert b is not None

    def loss(h: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, weight, targets, b, impl=impl, **options)

    assert torch.autograd.gradcheck(loss, (h, weight, b))
    assert torch.autograd.gradgradcheck(loss, (h, weight, b))


def test_every_row_ignored_is_a_loss_of_0_with_gradients_of_0() -> None:
    h, weight, targets, b = head(7, 3, 5)
    loss = linear_cross_entropy(h, weight, torch.full_like(targets, -100), b)
    assert loss == 0
    assert all((x == 0).all() for x in gradients(loss, h, weight, b))


def test_few_logits_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of characters has the same bits as ever."""
    monkeypatch.undo()
    h, weight, targets, _ = head(2000, 16, 65, torch.float32)
    got, whole = linear_cross_entropy(h, weight, targets), softmax_cross_entropy(F.linear(h, weight), targets)
    assert torch.equal(got, whole)
    for x, y in zip(gradients(got, h, weight), gradients(whole, h, weight), strict=True):
        assert torch.equal(x, y)


MEMORY = """
import re, torch
from chargpt.kernels import linear_cross_entropy
N, C, V = 2048, 32, 50257
h, weight, y = torch.randn(N, C).requires_grad_(), torch.randn(V, C).requires_grad_(), torch.randint(V, (N,))
def step(n):
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(h[:n], weight, y[:n]).backward()
def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
step(600)  # loads what it needs, and makes the gradients
h.grad = weight.grad = None
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
step(N)
print((kib("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="without the kernel the gradient has a buffer of its own")
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_2048_tokens_of_gpt2s_vocabulary_take_less_than_64_mib() -> None:
    """Beyond the gradients. All logits and their gradient would take 393 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert 24 < float(done.stdout) < 64 + 50257 * 32 * (4 + 2) / 2**20


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="the reference makes all logits")
def test_the_embedding_of_a_tied_head_adds_to_the_gradient_in_place() -> None:
    """A second table of GPT-2's 50,257 rows of 768 channels would take 147 MiB at the step's peak."""
    _, weight, targets, _ = head(7, 3, 5)
    h = F.embedding(targets.clamp(min=0), weight)
    loss = linear_cross_entropy(h, weight, targets)
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        loss.backward()  # type: ignore[no-untyped-call]
    sums = [event.name for event in profile.function_events if event.input_shapes[:2] == [[5, 3], [5, 3]]]
    assert sums == ["aten::add_"]


def test_fake_tensors_and_compilers_see_ordinary_operations() -> None:
    h, weight, targets, b = head(13, 8, 65, torch.float32)
    compiled = torch.compile(lambda *given: linear_cross_entropy(*given), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(h, weight, targets, b), linear_cross_entropy(h, weight, targets, b))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (h, weight, targets)]
        loss = linear_cross_entropy(*fakes)
        loss.backward()  # type: ignore[no-untyped-call]
    assert loss.shape == ()
    assert fakes[1].grad is not None
    assert fakes[1].grad.shape == weight.shape


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"h": torch.zeros(7, 4)}, ValueError, r"h must be \(\.\.\., C\) and weight \(V, C\)"),
        ({"weight": torch.zeros(3)}, ValueError, "h must be"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "V at least 1"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(5,\), got \(4,\)"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, ValueError, "targets"),
        ({"targets": torch.zeros(7)}, ValueError, "integer dtype"),
        ({"targets": torch.tensor([0, 1, 2, 3, 4, 5, 0])}, IndexError, "got 5 at position"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, ValueError, "one dtype outside autocast"),
        ({"h": torch.zeros(7, 3, device="meta")}, ValueError, "one device"),
        ({"reduction": "middle"}, ValueError, "reduction must be"),
        ({"softcap": -1.0}, ValueError, "softcap"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    h, weight, targets, b = head(7, 3, 5, torch.float32)
    arguments: dict[str, Any] = {"h": h, "weight": weight, "targets": targets, "bias": b} | changes
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)
