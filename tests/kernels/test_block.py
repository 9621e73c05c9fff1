"""A block's small operators: every implementation that runs here, against naive twins in float64.

The twins are loops over rows and heads, and turn channels as complex numbers. PyTorch's plain path, whose rounding is
the measure, is written out in single operations in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.kernels import activation, add_norm, causal_attention, qkv_heads
from chargpt.kernels.philox import row_keep_mask

from .cases import DRAWS, assert_as_right_as_torch, case_seed, implementations, naive_keep

IMPLEMENTATIONS = implementations("add_norm")
LOWER_PRECISION = implementations("add_norm", torch.float32, torch.bfloat16)
SEED = 5
EPS = {"rmsnorm": 1e-6, "layernorm": 1e-5}
Outputs = tuple[Tensor, ...]


def draw(name: str, number: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(case_seed(name) + number)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def leaf(x: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """x in a dtype and one of three layouts, as a leaf that requires gradients or a view of one."""
    if layout == "strided":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=dtype)
        wide[..., ::2] = x
        return wide.requires_grad_()[..., ::2]
    if layout == "sliced":
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=dtype)
        wide[..., : x.shape[-1]] = x
        return wide.requires_grad_()[..., : x.shape[-1]]
    return x.to(dtype).requires_grad_()


@dataclass(frozen=True)
class NormCase:
    name: str
    shape: tuple[int, ...] = (3, 5, 16)
    norm: str = "rmsnorm"
    x: bool = True
    y: torch.dtype | str | None = "as x"
    gains: tuple[str, ...] = ()  # "weight", "bias"
    dropout: float = 0.0
    autocast: bool = False  # to bfloat16
    spread: float = 1.0
    layout: str = "dense"

    def names(self) -> list[str]:
        return [*(["x"] if self.x else []), *([] if self.y is None else ["y"]), *self.gains]

    def inputs(self, dtype: torch.dtype, number: int = 0) -> list[Tensor]:
        other = dtype if self.y in ("as x", None) else self.y
        found = []
        for name in self.names():
            shape = self.shape if name in "xy" else self.shape[-1:]
            drawn = (self.spread if name in "xy" else 1) * draw(self.name + name, number, *shape)
            found.append(leaf(drawn, other if name == "y" else dtype, self.layout))  # type: ignore[arg-type]
        return found

    def run(self, inputs: list[Tensor], impl: str) -> Outputs:
        given = dict(zip(self.names(), inputs, strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if not torch.compiler.is_compiling():
                torch.manual_seed(SEED)
            return add_norm(given.pop("x", None), **given, norm=self.norm, dropout_p=self.dropout, impl=impl)

    def naive(self, inputs: list[Tensor]) -> Outputs:
        given = dict(zip(self.names(), inputs, strict=True))
        s = given["x"] if self.x else 0 * given["y"]
        if self.y is not None and self.dropout == 0:
            s = s + given["y"]
        elif self.y is not None:
            p, seed = int(self.dropout * 2**16) / 2**16, drawn_seed()
            rows = given["y"].reshape(-1, self.shape[-1])
            keep = [[naive_keep(seed, p, i >> 32, i, j) for j in range(rows.shape[1])] for i in range(len(rows))]
            s = s + torch.where(torch.tensor(keep, dtype=torch.bool).reshape(s.shape), given["y"] / (1 - p), 0)
        if self.norm == "none":
            return s, s
        rows = []
        for row in s.reshape(-1, s.shape[-1]):
            c = row - row.sum() / len(row) if self.norm == "layernorm" else row
            c = c / (c.dot(c) / len(row) + EPS[self.norm]).sqrt()
            c = c * given["weight"] if "weight" in given else c
            rows.append(c + given["bias"] if "bias" in given else c)
        return s, torch.stack(rows).reshape(s.shape) if rows else sum((given[name] for name in self.gains), start=s)

    def plain(self, inputs: list[Tensor]) -> Outputs:
        given = dict(zip(self.names(), inputs, strict=True))
        stream = inputs[0].dtype
        s = given["x"] if self.x else None
        if self.y is not None:
            y = given["y"]
            if self.dropout:
                p = int(self.dropout * 2**16) / 2**16
                keep = row_keep_mask(torch.tensor(drawn_seed()), p, y.numel() // y.shape[-1], y.shape[-1])
                y = y * (keep.reshape(y.shape).to(y.dtype) / (1 - p))
            s = y if s is None else (s + y).to(stream)
        assert s is not None
        if self.norm == "none":
            return s, s
        x = s.float()
        if self.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS[self.norm])
        normed = normed * given["weight"].float() if "weight" in given else normed
        normed = normed + given["bias"].float() if "bias" in given else normed
        return s, normed.to(torch.bfloat16 if self.autocast else s.dtype)


def drawn_seed() -> int:
    return int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(SEED)))


BOTH = ("weight", "bias")
# C: one, two, on both sides of whole vectors of 4 to 16, and of the runs that sums are made of (16 vectors: 256)
NORM_CASES = [
    *(NormCase(f"C{C}", (3, C)) for C in (1, 2, 3, 7, 8, 15, 16, 17, 33, 128, 255, 256, 257, 1000)),
    NormCase("C10000", (2, 10000)),
    NormCase("half_branch", (2, 9, 100), y=torch.bfloat16),
    NormCase("half_branch_and_norm", (2, 9, 100), y=torch.bfloat16, autocast=True),
    NormCase("half_norm", (2, 9, 100), autocast=True),
    NormCase("half_precision_branch", (2, 3, 10), y=torch.float16, autocast=True),
    NormCase("no_branch", (2, 3, 33), y=None),
    NormCase("no_branch_half_norm", (2, 3, 33), y=None, autocast=True),
    NormCase("one_row_no_batch", (70,)),
    NormCase("small", spread=1e-4),  # the squares are far below ε
    NormCase("large", spread=1e8),
    NormCase("strided", layout="strided"),
    NormCase("sliced", layout="sliced"),
    NormCase("no_rows", (0, 16)),
    NormCase("no_batch", (2, 0, 16), y=torch.bfloat16, autocast=True),
    *(NormCase(f"layer_C{C}", (3, C), "layernorm", gains=BOTH) for C in (3, 7, 16, 17, 100, 257, 1000)),
    NormCase("layer_C10000", (2, 10000), "layernorm"),
    NormCase("layer_plain", (5, 40), "layernorm"),
    NormCase("layer_weight", (5, 40), "layernorm", gains=("weight",)),
    NormCase("layer_rows", (40, 9), "layernorm", gains=BOTH),  # several blocks of rows
    NormCase("layer_half", (2, 9, 100), "layernorm", y=torch.bfloat16, gains=BOTH, autocast=True),
    NormCase("layer_strided", norm="layernorm", gains=BOTH, layout="strided"),
    NormCase("layer_small", norm="layernorm", spread=1e-4),
    NormCase("layer_no_branch", (2, 3, 33), "layernorm", y=None, gains=BOTH),
    NormCase("layer_no_rows", (0, 16), "layernorm", gains=BOTH),
    NormCase("rms_gains", (5, 40), gains=BOTH),
    NormCase("no_norm", norm="none"),
    NormCase("dropout", (3, 7, 50), dropout=0.3),
    NormCase("dropout_layer", (3, 7, 50), "layernorm", gains=BOTH, dropout=0.3),
    NormCase("dropout_half", (3, 7, 50), "layernorm", y=torch.bfloat16, gains=BOTH, dropout=0.2, autocast=True),
    NormCase("dropout_C300", (2, 300), dropout=0.5),
    NormCase("dropout_alone", (3, 7, 50), "none", dropout=0.3),
    NormCase("dropout_of_the_stream", (3, 7, 50), "layernorm", x=False, gains=("weight",), dropout=0.3),
    NormCase("dropout_of_the_stream_alone", (3, 7, 50), "none", x=False, dropout=0.9),
    NormCase("dropout_sliced", norm="layernorm", dropout=0.1, layout="sliced"),
]


@dataclass(frozen=True)
class HeadsCase:
    name: str
    B: int = 2
    T: int = 5
    H: int = 4
    H_kv: int = 2
    D: int = 8
    norm: bool = True
    rotary: bool = True
    rows: torch.dtype | str | None = "as qkv"
    spread: float = 1.0
    layout: str = "dense"

    def inputs(self, dtype: torch.dtype, number: int = 0) -> list[Tensor]:
        qkv = self.spread * draw(self.name + "qkv", number, self.B, self.T, (self.H + 2 * self.H_kv) * self.D)
        rows = draw(self.name + "rows", number, self.B, self.T, self.H_kv * self.D)
        other = dtype if self.rows == "as qkv" else self.rows
        return [leaf(qkv, dtype, self.layout), *([] if other is None else [leaf(rows, other, self.layout)])]  # type: ignore

    def angles(self) -> tuple[Tensor | None, Tensor | None]:
        """(T + 3, D/2): a table may be longer than the sequence."""
        if not self.rotary:
            return None, None
        angles = torch.outer(torch.arange(self.T + 3), 1 / torch.arange(1, self.D // 2 + 1))
        return angles.cos().float(), angles.sin().float()

    def run(self, inputs: list[Tensor], impl: str) -> Outputs:
        qkv, rows = [*inputs, None][:2]
        assert qkv is not None
        options: Any = {"n_head": self.H, "n_kv_head": self.H_kv, "qk_norm": self.norm}
        return qkv_heads(qkv, rows, *self.angles(), **options, impl=impl)

    def naive(self, inputs: list[Tensor]) -> Outputs:
        cos, sin = self.angles()
        tokens = inputs[0].reshape(self.B, self.T, self.H + 2 * self.H_kv, self.D)
        heads = []
        for h in range(self.H + 2 * self.H_kv):
            x = tokens[:, :, h]  # (B, T, D)
            if h >= self.H + self.H_kv:
                if len(inputs) > 1:
                    x = x + inputs[1].reshape(self.B, self.T, self.H_kv, self.D)[:, :, h - self.H - self.H_kv]
            else:
                if self.norm:
                    x = x / ((x * x).sum(-1, keepdim=True) / self.D + EPS["rmsnorm"]).sqrt()
                if cos is not None and sin is not None:
                    z = torch.complex(x[..., : self.D // 2], x[..., self.D // 2 :])
                    z = z * torch.complex(cos[: self.T].double(), sin[: self.T].double())
                    x = torch.cat([z.real, z.imag], dim=-1)
            heads.append(x)
        stacked = torch.stack(heads, dim=2)  # (B, T, heads, D)
        return tuple(x.transpose(1, 2) for x in stacked.split([self.H, self.H_kv, self.H_kv], dim=2))

    def plain(self, inputs: list[Tensor]) -> Outputs:
        dtype = inputs[0].dtype
        x = inputs[0].float().reshape(self.B, self.T, self.H + 2 * self.H_kv, self.D).transpose(1, 2)
        q, k, v = x.split([self.H, self.H_kv, self.H_kv], dim=1)
        if len(inputs) > 1:
            v = v + inputs[1].float().reshape(self.B, self.T, self.H_kv, self.D).transpose(1, 2)

        def turn(x: Tensor) -> Tensor:
            if self.norm:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS["rmsnorm"])
            cos, sin = self.angles()
            if cos is None or sin is None:
                return x
            a, b = x.chunk(2, dim=-1)
            c, s = cos[: self.T], sin[: self.T]
            return torch.cat([a * c - b * s, a * s + b * c], dim=-1)

        return turn(q).to(dtype), turn(k).to(dtype), v.to(dtype)


# D: two, and halves on both sides of whole vectors; odd where nothing is rotated
HEADS_CASES = [
    *(HeadsCase(f"D{D}", D=D) for D in (2, 6, 8, 16, 30, 32, 34, 64, 80, 128)),
    *(HeadsCase(f"no_rotary_D{D}", D=D, rotary=False) for D in (1, 17, 31)),
    HeadsCase("no_norm", D=32, norm=False),
    HeadsCase("neither", D=7, norm=False, rotary=False),
    HeadsCase("nothing_to_do", norm=False, rotary=False, rows=None),
    HeadsCase("no_rows", D=32, rows=None),
    HeadsCase("float_rows", D=31, rotary=False, rows=torch.float32),
    HeadsCase("other_rows", rows=torch.float16),
    HeadsCase("one_position", T=1, H=1, H_kv=1),
    HeadsCase("small", spread=1e-4),
    HeadsCase("strided", layout="strided"),
    HeadsCase("sliced", layout="sliced"),
    HeadsCase("no_batch", B=0),
    HeadsCase("no_positions", T=0),
]


@dataclass(frozen=True)
class ActivationCase:
    name: str
    kind: str = "gelu"
    shape: tuple[int, ...] = (3, 5, 16)
    spread: float = 1.0
    layout: str = "dense"

    def inputs(self, dtype: torch.dtype, number: int = 0) -> list[Tensor]:
        return [leaf(self.spread * draw(self.name, number, *self.shape), dtype, self.layout)]

    def run(self, inputs: list[Tensor], impl: str) -> Outputs:
        return (activation(inputs[0], self.kind, impl=impl),)

    def naive(self, inputs: list[Tensor]) -> Outputs:
        (x,) = inputs
        if self.kind == "relu":
            return (torch.where(x > 0, x, 0 * x),)
        if self.kind == "relu2":
            return (torch.where(x > 0, x**2, 0 * x),)
        if self.kind == "gelu":
            return (x * torch.special.erfc(-x / 2**0.5) / 2,)
        if self.kind == "gelu_tanh":
            return (x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),)
        gate, h = x.chunk(2, -1)
        return (gate / (1 + (-gate).exp()) * h,)

    def plain(self, inputs: list[Tensor]) -> Outputs:
        (x,) = inputs
        if self.kind in ("relu", "relu2"):
            return (x.clamp(min=0) * (1 if self.kind == "relu" else x.clamp(min=0)),)
        if self.kind == "swiglu":
            gate, h = x.chunk(2, -1)
            return (F.silu(gate) * h,)
        return (F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none"),)


ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "swiglu")
ACTIVATION_CASES = [
    *(ActivationCase(f"{kind}_n{n}", kind, (n,)) for kind in ACTIVATIONS[:4] for n in (0, 1, 7, 16, 17, 1000)),
    *(ActivationCase(f"swiglu_W{W}", "swiglu", (3, 2 * W)) for W in (0, 1, 7, 16, 17, 500)),
    ActivationCase("swiglu_no_rows", "swiglu", (0, 8)),
    *(ActivationCase(f"{kind}_wide", kind, (200, 16), spread=6.0) for kind in ACTIVATIONS),
    *(ActivationCase(f"{kind}_small", kind, (50, 16), spread=1e-4) for kind in ACTIVATIONS),
    *(
        ActivationCase(f"{kind}_{layout}", kind, layout=layout)
        for kind in ACTIVATIONS
        for layout in ("strided", "sliced")
    ),
    *(ActivationCase(f"{kind}_no_dimension", kind, ()) for kind in ACTIVATIONS[:4]),
]
Case = NormCase | HeadsCase | ActivationCase
CASES: list[Case] = [*NORM_CASES, *HEADS_CASES, *ACTIVATION_CASES]
TYPICAL: list[Case] = [
    NormCase("typical", (2, 6, 20), y=torch.bfloat16, autocast=True),
    NormCase("alone", (2, 6, 20), y=None),
    HeadsCase("typical", D=20),
    HeadsCase("nothing_to_do", norm=False, rotary=False, rows=None),
    ActivationCase("typical", "relu2"),
    NormCase("layer", (2, 6, 20), "layernorm", y=torch.bfloat16, gains=BOTH, autocast=True),
    NormCase("layer_dropout", (2, 6, 20), "layernorm", gains=BOTH, dropout=0.3),
    NormCase("stream_dropout", (2, 6, 20), x=False, gains=("weight",), dropout=0.3),
    NormCase("no_norm", (2, 6, 20), "none", dropout=0.3),
    ActivationCase("gelu", "gelu"),
    ActivationCase("swiglu", "swiglu"),
]


def name_of(case: Case) -> str:
    return f"{type(case).__name__.removesuffix('Case')}_{case.name}"


def upstream(outputs: Outputs, number: int = 0) -> list[Tensor]:
    """Gradients in the dtypes of the outputs, the same numbers for all implementations."""
    return [draw("upstream", number + i, *x.shape).to(x.dtype) for i, x in enumerate(outputs)]


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float64_is_the_naive_twins(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.float64)
    exacts = [exact(x) for x in inputs]
    got, truth = case.run(inputs, impl), case.naive(exacts)
    assert all(x.dtype == torch.float64 for x in got)
    given = upstream(got)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12, check_stride=False)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, given), torch.autograd.grad(truth, exacts, given), strict=True
    ):
        rounding = 0 if ours.dtype == torch.float64 else torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=max(1e-9, rounding), atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize(("impl", "dtype"), LOWER_PRECISION, ids=str)
def test_lower_precision_loses_no_more_than_torch(case: Case, impl: str, dtype: torch.dtype) -> None:
    columns: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for number in DRAWS:
        inputs = case.inputs(dtype, number)
        exacts = [exact(x) for x in inputs]
        got, truth, plain = case.run(inputs, impl), case.naive(exacts), case.plain(inputs)
        given = upstream(got, number)
        gradients = [
            torch.autograd.grad(got, inputs, given),
            torch.autograd.grad(truth, exacts, [x.double() for x in given]),
            torch.autograd.grad(plain, inputs, given),
        ]
        for kind, results in (("output", (got, truth, plain)), ("gradient", gradients)):
            for i, column in enumerate(zip(*results, strict=True)):
                columns.setdefault(f"{kind} {i}", []).append(column)
    for name, draws in columns.items():
        assert_as_right_as_torch(name, draws)


@pytest.mark.parametrize(
    "case",
    [
        NormCase("check", (2, 5)),
        NormCase("check", (2, 5), y=None),
        NormCase("check", (2, 5), "layernorm"),
        NormCase("check", (2, 5), "layernorm", gains=("weight",)),
        NormCase("check", (2, 5), "layernorm", gains=BOTH, dropout=0.3),
        NormCase("check", (2, 5), "rmsnorm", gains=BOTH),
        NormCase("check", (2, 5), x=False, dropout=0.3),
        NormCase("check", (2, 5), "none", dropout=0.3),
        HeadsCase("check", B=1, T=2, H=2, H_kv=1, D=4),
        HeadsCase("check", B=1, T=2, H=1, H_kv=1, D=3, rotary=False),
        HeadsCase("check", B=1, T=2, H=1, H_kv=1, D=2, norm=False),
        *(ActivationCase(f"check_{kind}", kind, (8,)) for kind in ACTIVATIONS),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck_and_the_gradient_of_the_gradient(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: case.run(list(x), impl), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: case.run(list(x), impl), inputs)


@pytest.mark.parametrize("case", TYPICAL, ids=name_of)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_gradient_may_be_missing_or_strided(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.float32)
    got, plain = case.run(inputs, impl), case.plain(inputs)
    for i, (ours, theirs) in enumerate(zip(got, plain, strict=True)):
        dense = draw("missing", i, *ours.shape).to(ours.dtype)
        for given in (dense, dense.transpose(0, -1).contiguous().transpose(0, -1), dense[..., :1].expand_as(dense)):
            results = [
                torch.autograd.grad(x, inputs, given, retain_graph=True, allow_unused=True, materialize_grads=True)
                for x in (ours, theirs)
            ]
            torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_that_want_no_gradient_get_none_and_change_nothing(impl: str) -> None:
    for case in (
        NormCase("fixed", y=torch.bfloat16, autocast=True),
        NormCase("fixed", norm="layernorm", gains=BOTH, dropout=0.3),
        HeadsCase("fixed"),
    ):
        inputs = case.inputs(torch.float32)
        wanted = torch.autograd.grad(case.run(inputs, impl), inputs, upstream(case.run(inputs, impl)))
        for i in range(len(inputs)):
            some = [x if i == j else x.detach() for j, x in enumerate(inputs)]
            got = case.run(some, impl)
            reached = [(y, dy) for y, dy in zip(got, upstream(got), strict=True) if y.requires_grad]
            (alone,) = torch.autograd.grad([y for y, _ in reached], some[i], [dy for _, dy in reached])
            torch.testing.assert_close(alone, wanted[i])


@pytest.mark.parametrize("case", TYPICAL, ids=name_of)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_gradients_the_results_are_the_same(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.float32)
    kept = case.run(inputs, impl)
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(case.run(inputs, impl), kept, strict=True))
    with torch.inference_mode():
        assert all(torch.equal(x, y) for x, y in zip(case.run(inputs, impl), kept, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_a_branch_the_stream_itself_comes_back(impl: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert add_norm(x, norm="rmsnorm", impl=impl)[0] is x
    assert add_norm(None, x, norm="layernorm", impl=impl)[0] is x
    assert add_norm(x, norm="none", impl=impl)[1] is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_norm_has_the_dtype_of_the_autocast_region(impl: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, dtype=dtype)
    assert [y.dtype for y in add_norm(x, x, norm="layernorm", impl=impl)] == [dtype, dtype]
    for region in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", region):
            s, normed = add_norm(x, x, norm="layernorm", impl=impl)
        assert (s.dtype, normed.dtype) == (dtype, torch.float64 if dtype == torch.float64 else region)


@pytest.mark.parametrize("case", TYPICAL, ids=name_of)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_leaves_its_inputs_alone(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.float32)
    before = [x.detach().clone() for x in inputs]
    got = case.run(inputs, impl)
    torch.autograd.grad(got, inputs, upstream(got))
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("case", [TYPICAL[1], TYPICAL[2], TYPICAL[4], ActivationCase("gelu")], ids=name_of)
@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no native module")
def test_an_input_that_was_overwritten_is_noticed(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    copies = [1 * x for x in inputs]
    got = case.run(copies, "cpp")[-1 if isinstance(case, NormCase) else 0]
    with torch.no_grad():
        copies[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(got.sum(), inputs[0])


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no native module")
def test_heads_that_are_views_of_the_projection_cannot_be_overwritten_unnoticed() -> None:
    case = HeadsCase("views", rows=None)
    qkv = case.inputs(torch.float32)
    v = case.run([1 * qkv[0]], "cpp")[2]
    with pytest.raises(RuntimeError, match="view"):
        v.add_(1)


@pytest.mark.parametrize("case", [*TYPICAL[:4], TYPICAL[6], TYPICAL[-1]], ids=name_of)  # each takes seconds
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_into_one_graph(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.float32)
    torch.manual_seed(SEED)
    torch.compiler.reset()  # one function after the other: past eight, torch.compile gives up
    compiled = torch.compile(lambda *x: case.run(list(x), impl), fullgraph=True, backend="aot_eager")(*inputs)
    eager = case.run(inputs, impl)
    torch.testing.assert_close(compiled, eager, check_stride=False)
    given = upstream(eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs, given), torch.autograd.grad(eager, inputs, given))


@pytest.mark.parametrize("case", TYPICAL, ids=name_of)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_torch_func(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.float64)

    def total(*x: Tensor) -> Tensor:
        return sum((y.double().square().sum() for y in case.run(list(x), impl)), start=torch.zeros(()))

    got = torch.func.grad(total, argnums=tuple(range(len(inputs))))(*(x.detach() for x in inputs))
    for ours, theirs in zip(got, torch.autograd.grad(total(*inputs), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_and_infinity_are_not_hidden(impl: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 2.0], requires_grad=True)
    y = activation(x, "relu2", impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach(), torch.tensor([torch.nan, torch.inf, 0, 0, 0, 4]), equal_nan=True)
    torch.testing.assert_close(dx, torch.tensor([torch.nan, torch.inf, 0, 0, 0, 4]), equal_nan=True)
    for C in (5, 100):
        x = torch.ones(3, C)
        x[1, C - 1] = torch.nan
        s, normed = add_norm(x, x, norm="layernorm", impl=impl)
        assert s.isnan().sum() == 1
        assert normed.isnan().all(-1).tolist() == [False, True, False]
        assert not normed[::2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no native module")
def test_far_from_zero_an_activation_is_a_ramp(kind: str, dtype: torch.dtype) -> None:
    """Where a square or a power is infinite, and its factor 0. torch's own slopes are NaN at some of them."""
    x = torch.tensor([-3e38, -1e30, -1e10, -1000.0, 1000.0, 1e10, 1e30, 3e38], dtype=dtype, requires_grad=True)
    y = activation(torch.cat([x, torch.ones_like(x)]) if kind == "swiglu" else x, kind, impl="cpp")
    torch.testing.assert_close(y, x.clamp(min=0), atol=1e-6, rtol=1e-6)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, (x > 0).to(dtype), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        NormCase("threads", (300, 129)),
        NormCase("threads_layer", (3000, 129), "layernorm", gains=BOTH, dropout=0.2),
        HeadsCase("threads", T=301, D=16),
        *(ActivationCase(f"threads_{kind}", kind, (301, 500)) for kind in ACTIVATIONS),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "torch"])
def test_threads_change_no_bit(impl: str, case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = case.run(inputs, impl)
            results.append((*got, *torch.autograd.grad(got, inputs, upstream(got))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_keeps_what_is_drawn_at_its_very_threshold(impl: str) -> None:
    """One draw of 65,536 is; it was not among those of the small cases."""
    rows, channels, p = 600, 1000, 0.25
    keep, fewer = (
        row_keep_mask(torch.tensor(drawn_seed()), threshold, rows, channels) for threshold in (p, p + 2**-16)
    )
    assert 1 <= (keep != fewer).sum() < 40
    torch.manual_seed(SEED)
    got, _ = add_norm(None, torch.ones(rows, channels), norm="none", dropout_p=p, impl=impl)
    assert torch.equal(got != 0, keep)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no native module")
@pytest.mark.parametrize(("H", "H_kv", "T", "D"), [(4, 4, 64, 32), (6, 2, 33, 17), (1, 1, 1, 1)])
def test_attention_writes_the_gradient_of_a_packed_projection(H: int, H_kv: int, T: int, D: int) -> None:
    """Heads that were only split need no copy to be joined, and bits are those of copies."""
    found = {}
    for impl in ("cpp", "torch"):
        qkv = draw("packed", 0, 2, T, (H + 2 * H_kv) * D).requires_grad_()
        q, k, v = qkv_heads(qkv, n_head=H, n_kv_head=H_kv, qk_norm=False, impl=impl)
        out = causal_attention(q, k, v, impl="cpp")
        flowing_in = draw("upstream", 0, *out.shape)
        with torch.autograd.profiler.profile() as profile:
            out.backward(flowing_in)
        made = [event.name for event in profile.function_events]
        assert (not {"aten::empty", "aten::cat"} & set(made)) == (impl == "cpp")
        assert qkv.grad is not None
        found[impl] = qkv.grad
    assert torch.equal(found["cpp"], found["torch"])


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no native module")
@pytest.mark.parametrize("held", ["asked for", "kept by a hook", "retained"])
def test_a_gradient_that_somebody_holds_shares_no_memory(held: str) -> None:
    """Else a change of one would be a change of another."""
    qkv = draw("packed", 0, 2, 5, 48).requires_grad_()
    q, k, v = qkv_heads(qkv, n_head=4, n_kv_head=2, qk_norm=False, impl="cpp")
    kept: list[Tensor] = []
    if held == "kept by a hook":
        k.register_hook(lambda g: kept.append(g))
    elif held == "retained":
        v.retain_grad()
    loss = causal_attention(q, k, v, impl="cpp").square().sum()
    if held == "asked for":
        dqkv, *kept = torch.autograd.grad(loss, [qkv, q, k, v])
    else:
        loss.backward()
        assert qkv.grad is not None
        dqkv, kept = qkv.grad, kept or [v.grad]  # type: ignore[list-item]
    before = [x.clone() for x in kept]
    dqkv.zero_()
    assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no native module")
@pytest.mark.parametrize("change", ["other", "in place", "one missing", "shorter queries"])
def test_gradients_that_lie_otherwise_are_joined_by_copies(change: str) -> None:
    found = []
    for impl in ("cpp", "torch"):
        qkv = draw("packed", 0, 2, 9, 3 * 2 * 8).requires_grad_()
        q, k, v = qkv_heads(qkv, n_head=2, n_kv_head=2, qk_norm=False, impl=impl)
        if change == "other":
            k.register_hook(lambda g: 2 * g)
        elif change == "in place":
            k.register_hook(lambda g: g.mul_(2))
        elif change == "one missing":
            v = v.detach()
        else:
            q = q[:, :, 4:]
        out = causal_attention(q, k, v, impl="cpp")
        found.append(torch.autograd.grad(out, qkv, draw("upstream", 0, *out.shape))[0])
    assert torch.equal(*found)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no native module")
class TestOperators:
    """What torch.library asks of the C++ kernels' operators."""

    @pytest.mark.parametrize(("rows", "dtype"), [(3, torch.float32), (0, torch.bfloat16)], ids=str)
    def test_opcheck(self, rows: int, dtype: torch.dtype) -> None:
        ops = torch.ops.chargpt
        x = torch.randn(2, rows, 10, dtype=dtype, requires_grad=True)
        weight = torch.randn(10, requires_grad=True)
        seed = torch.tensor(5)
        torch.library.opcheck(ops.row_dropout.default, (x, 0.25, seed))
        for norm, gains in ((1, (weight, weight)), (1, (weight, None)), (2, (None, None))):
            torch.library.opcheck(ops.norm.default, (x, *gains, norm, dtype))
            given = [None if one is None else one.detach() for one in (x, *gains)]
            _, statistics = ops.norm(*given, norm, dtype)
            arguments = (torch.ones_like(x), *given, statistics, norm)
            torch.library.opcheck(ops.norm_backward.default, arguments)
        for kind in (3, 4):  # GELU, SwiGLU
            torch.library.opcheck(ops.activation.default, (x, kind))
            dy = torch.ones_like(ops.activation(x.detach(), kind))
            torch.library.opcheck(ops.activation_backward.default, (dy, x.detach(), kind))
        for case in (HeadsCase("opcheck", T=rows), HeadsCase("opcheck", T=rows, norm=False, rotary=False)):
            inputs, options = case.inputs(dtype), (*case.angles(), case.H, case.H_kv, case.norm)
            torch.library.opcheck(ops.qkv_heads.default, (*inputs, *options))
            heads = [torch.ones_like(x) for x in ops.qkv_heads(*(x.detach() for x in inputs), *options)]
            qkv = inputs[0].detach() if case.norm else None
            torch.library.opcheck(ops.qkv_heads_backward.default, (*heads, qkv, *options))
            torch.library.opcheck(ops.qkv_heads_backward.default, (None, heads[1], None, qkv, *options))

    @pytest.mark.parametrize("case", TYPICAL, ids=name_of)
    def test_a_dispatch_mode_sees_operators_that_agree_with_the_eager_path(self, case: Case) -> None:
        seen: set[str] = set()

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.add(str(f))
                return f(*args, **kwargs or {})

        def results() -> list[Tensor]:
            inputs = case.inputs(torch.float32)
            got = case.run(inputs, "cpp")
            return [*got, *torch.autograd.grad(got, inputs, upstream(got))]

        eager = results()
        with Watch():
            watched = results()
        torch.testing.assert_close(watched, eager, check_stride=False)
        assert any(name.startswith("chargpt.") and ("backward" in name or "row_dropout" in name) for name in seen)

    def test_fake_tensors_pass_through(self) -> None:
        for case in TYPICAL:
            inputs = case.inputs(torch.float32)
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                got = case.run([mode.from_tensor(x.detach()) for x in inputs], "cpp")
            real = case.run(inputs, "cpp")
            assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in real]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


ONE_HEAD = {"n_head": 1, "n_kv_head": 1, "qk_norm": False}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_norm(None, norm="none"), "x or y must be given"),
        (lambda: add_norm(zeros(), norm="none"), r"x must be \(\.\.\., C\).*got \(\)"),
        (lambda: add_norm(zeros(2, 0), norm="none"), "C at least 1"),
        (lambda: add_norm(zeros(2, 3).int(), norm="none"), "x must have a floating dtype.*int32"),
        (lambda: add_norm(zeros(2, 3), zeros(3), norm="none"), r"one shape, got \(2, 3\) and \(3,\)"),
        (lambda: add_norm(zeros(2, 3), zeros(2, 3).double(), norm="none"), "got torch.float64 beside torch.float32"),
        (lambda: add_norm(zeros(2, 3), norm="batch"), "norm must be one of none, layernorm, rmsnorm, got 'batch'"),
        (lambda: add_norm(zeros(2, 3), zeros(2, 3), norm="none", dropout_p=1.0), r"in \[0, 1\), got 1.0"),
        (lambda: add_norm(zeros(2, 3), zeros(2, 3), norm="none", dropout_p=-0.1), r"in \[0, 1\), got -0.1"),
        (lambda: add_norm(zeros(2, 3), zeros(2, 3), norm="none", dropout_p=float("nan")), "got nan"),
        (lambda: add_norm(zeros(2, 3), bias=zeros(3), norm="layernorm"), "a bias needs a weight"),
        (lambda: add_norm(zeros(2, 3), weight=zeros(3), norm="none"), "a weight needs a norm"),
        (
            lambda: add_norm(zeros(2, 3), weight=zeros(2), norm="layernorm"),
            r"weight must be floating \(3,\), got .*\(2,\)",
        ),
        (
            lambda: add_norm(zeros(2, 3), None, zeros(3), zeros(3).int(), norm="layernorm"),
            "bias must be floating .*int32",
        ),
        (
            lambda: add_norm(zeros(2, 3), weight=zeros(3).to("meta"), norm="layernorm"),
            "x and weight must be on one device",
        ),
        (lambda: qkv_heads(zeros(1, 2, 4), **ONE_HEAD), r"qkv must be \(B, T, 3 D\).*\(1, 2, 4\)"),
        (lambda: qkv_heads(zeros(2, 3), **ONE_HEAD), "qkv must be"),
        (lambda: qkv_heads(zeros(1, 2, 0), **ONE_HEAD), "D at least 1"),
        (lambda: qkv_heads(zeros(1, 2, 6), **ONE_HEAD | {"n_head": 0}), "at least 1, got 0 and 1"),
        (lambda: qkv_heads(zeros(1, 2, 6).int(), **ONE_HEAD), "qkv must have a floating dtype"),
        (lambda: qkv_heads(zeros(1, 2, 6), zeros(1, 2, 3), **ONE_HEAD), r"value_rows must be floating \(1, 2, 2\)"),
        (lambda: qkv_heads(zeros(1, 2, 6), None, zeros(2, 1), **ONE_HEAD), "given together"),
        (lambda: qkv_heads(zeros(1, 2, 6), None, zeros(1, 1), zeros(1, 1), **ONE_HEAD), r"\(at least 2, D/2\)"),
        (lambda: qkv_heads(zeros(1, 2, 9), None, zeros(2, 1), zeros(2, 1), **ONE_HEAD), "D=3 even"),
        (lambda: qkv_heads(zeros(1, 2, 6), None, zeros(3, 1), zeros(2, 1), **ONE_HEAD), r"got \(3, 1\) and \(2, 1\)"),
        (lambda: qkv_heads(zeros(1, 2, 6), None, zeros(2, 1), zeros(2), **ONE_HEAD), r"got \(2, 1\) and \(2,\)"),
        (lambda: qkv_heads(zeros(1, 2, 6), None, zeros(2), zeros(2), **ONE_HEAD), r"got \(2,\) and \(2,\)"),
        (lambda: qkv_heads(zeros(1, 2, 6), None, zeros(2, 2), zeros(2, 2), **ONE_HEAD), r"got \(2, 2\) and \(2, 2\)"),
        (lambda: qkv_heads(zeros(1, 2, 6), None, zeros(2, 1).double(), zeros(2, 1), **ONE_HEAD), "must be float32"),
        (lambda: activation(zeros(2).int(), "relu"), "x must have a floating dtype.*int32"),
        (lambda: activation(zeros(2), "none"), "kind must be one of relu, relu2, gelu, swiglu, gelu_tanh, got 'none'"),
        (lambda: activation(zeros(2, 3), "swiglu"), r"x must be \(..., 2 W\) for swiglu, got \(2, 3\)"),
        (lambda: activation(zeros(), "swiglu"), r"x must be \(..., 2 W\) for swiglu, got \(\)"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_bfloat16_is_rounded_as_torch_rounds(impl: str) -> None:
    """Squares of eight bits have sixteen, so half of them lie between two bfloat16, and many in the middle."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wanted = x.float().relu().square().bfloat16()
    got = activation(x.view(256, 256), "relu2", impl=impl).flatten()
    same = (got.view(torch.int16) == wanted.view(torch.int16)) | (got.isnan() & wanted.isnan())
    # The instruction of AVX512-BF16 takes numbers below 2^-126 for 0.
    tiny = (wanted < 2.0**-126) & (got == 0)
    assert (same | tiny).all(), x[~(same | tiny)][:5]
