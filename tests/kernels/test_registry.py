"""Which implementation a call gets: data in one table, and a sentence for every refusal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chargpt.errors import ConfigError
from chargpt.kernels import (
    available_implementations,
    causal_attention,
    describe_implementations,
    reference,
    registry,
    resolve,
    softmax_cross_entropy,
)
from chargpt.kernels.registry import Implementation


def test_the_reference_is_always_available_and_the_rest_say_why_not() -> None:
    described = describe_implementations()
    assert set(described) == {"torch", "cpp", "cuda", "triton"}
    assert "torch" in available_implementations()
    for name, sentence in described.items():
        if name in available_implementations():
            assert sentence.startswith("available: ")
        else:
            assert sentence.startswith("not available: ")
            assert len(sentence) > len("not available: ") + 10


@given(
    st.sampled_from(["causal_attention", "softmax_cross_entropy"]),
    st.sampled_from(["cpu", "cuda", "cuda:1", "mps", "meta"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_auto_never_fails(operation: registry.Operation, device: str, dtype: torch.dtype) -> None:
    choice = resolve(operation, device, dtype)
    assert choice.name in available_implementations()
    assert choice.reason


def test_a_name_that_cannot_run_is_an_error_with_the_reason() -> None:
    q = torch.zeros(1, 1, 1, 1)
    for name in {"cpp", "cuda", "triton"} - set(available_implementations()):
        reason = describe_implementations()[name].removeprefix("not available: ")
        with pytest.raises(ConfigError, match=f"kernels={name} cannot run causal_attention") as error:
            causal_attention(q, q, q, impl=name)
        assert reason in str(error.value)
        with pytest.raises(ConfigError, match=f"kernels={name} cannot run softmax_cross_entropy"):
            softmax_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), impl=name)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="one of auto, cuda, triton, cpp, torch; got 'numpy'"):
        resolve("causal_attention", "cpu", torch.float32, "numpy")


def test_auto_takes_the_first_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def f() -> None: ...

    table = (
        Implementation("broken", "broken", f, f, problem=lambda: "no compiler"),
        Implementation("gpu", "gpu", f, f, devices=("cuda",)),
        Implementation("half", "half", f, None, dtypes=(torch.bfloat16,)),
        registry.IMPLEMENTATIONS[-1],
    )
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", table)
    assert available_implementations() == ("gpu", "half", "torch")
    assert resolve("causal_attention", "cuda:0", torch.float32).name == "gpu"
    assert resolve("causal_attention", "cpu", torch.bfloat16).name == "half"
    assert resolve("softmax_cross_entropy", "cpu", torch.bfloat16).name == "torch"
    choice = resolve("causal_attention", "cpu", torch.float32)
    assert choice.name == "torch"
    assert choice.reason == (
        "not broken, because no compiler; not gpu, because it runs on cuda, not on cpu; "
        "not half, because it takes torch.bfloat16, not torch.float32"
    )
    with pytest.raises(ConfigError, match="it has no softmax_cross_entropy"):
        resolve("softmax_cross_entropy", "cpu", torch.bfloat16, "half")


def test_the_last_entry_serves_everything() -> None:
    last = registry.IMPLEMENTATIONS[-1]
    assert (last.devices, last.dtypes, last.problem()) == (None, None, None)
    assert last.causal_attention is reference.causal_attention
