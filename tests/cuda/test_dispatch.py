"""Which calls the CUDA kernels take on a given GPU, asked with GPUs that are not there."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from chargpt.kernels import native
from chargpt.kernels.backends import cuda
from chargpt.kernels.ops.attention import reference as reference_attention

SM86, SM90 = 99 << 10, 227 << 10  # bytes of shared memory that a block can have


@pytest.mark.parametrize(
    ("architectures", "runs", "runs_not"),
    [
        ("8.0;9.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], []),  # the default of setup.py
        ("8.0;9.0", [(8, 0), (8, 9), (9, 0)], [(10, 0), (12, 0)]),
        ("8.6 9.0", [(8, 6), (8, 9)], [(8, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (12, 0)], []),
        ("9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("12.0", [(12, 0), (12, 1)], [(10, 0)]),
        ("Hopper", [(8, 0)], []),  # not judged
        ("", [(8, 0)], []),  # of a record that does not say
    ],
)
def test_code_runs_on_the_chips_it_was_built_for(
    architectures: str, runs: list[tuple[int, int]], runs_not: list[tuple[int, int]]
) -> None:
    assert [gpu for gpu in runs + runs_not if cuda.runs_on(architectures, gpu)] == runs


@pytest.mark.parametrize(
    ("gpus", "missed"), [([(8, 6)], None), ([(8, 6), (9, 0)], "9.0"), ([(10, 0)], "10.0"), ([(8, 0)], "8.0")]
)
def test_a_build_for_other_chips_is_a_reason_that_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: list[tuple[int, int]], missed: str | None
) -> None:
    record = tmp_path / "_native.json"
    record.write_text(json.dumps({"cuda": "13.0 for 8.6"}))
    monkeypatch.setattr(native, "RECORD", record)
    monkeypatch.setattr(native, "load_cuda", lambda: native.Native(ModuleType("kernels"), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: gpus[index])
    problem = cuda.problem()
    if missed is None:
        assert problem is None
    else:
        assert problem == (
            f"the GPU has compute capability {missed}, the kernels were built for 8.6; "
            f"set TORCH_CUDA_ARCH_LIST={missed} and {native.REBUILD}"
        )


@pytest.mark.parametrize(
    ("dtype", "D", "shared", "ours"),
    [
        (torch.float32, 128, SM86, True),
        (torch.float32, 129, SM86, False),
        (torch.float32, 256, SM86, False),
        (torch.float32, 256, SM90, True),
        (torch.bfloat16, 256, SM86, True),
    ],
    ids=str,
)
def test_float32_heads_too_wide_for_the_gpus_shared_memory_are_the_references(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, D: int, shared: int, ours: bool
) -> None:
    """The launch would fail with CUDA's own error, in the middle of a run."""
    called = []

    def kernels(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        called.append(q.shape)
        return torch.full_like(q, 7)

    module = SimpleNamespace(wide_float32_shared_bytes=wide_float32_shared_bytes())
    monkeypatch.setattr(native, "load_cuda", lambda: native.Native(module, None))  # type: ignore[arg-type]
    gpu = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setitem(cuda.LIBRARY.functions, "causal_attention", kernels)
    q = torch.randn(1, 2, 3, D, dtype=dtype)
    options = {"scale": 0.1, "dropout_p": 0.0, "window": None, "seed": None, "return_lse": False}
    out = cuda.causal_attention(q, q, q, **options)
    assert called == ([q.shape] if ours else [])
    expected = torch.full_like(q, 7) if ours else reference_attention(q, q, q, **options)  # type: ignore[arg-type]
    assert torch.equal(out, expected)  # type: ignore[arg-type]


def wide_float32_shared_bytes() -> int:
    """As csrc/cuda has it, which asserts that it is what the kernels ask for."""
    header = (Path(__file__).parents[2] / "csrc" / "cuda" / "attention.h").read_text()
    return int(header.partition("kWideFloat32SharedBytes = ")[2].partition(";")[0])
