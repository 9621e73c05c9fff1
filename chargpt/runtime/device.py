"""Where and how a model runs: device, precision, compilation and backend, each chosen with its reason.

`auto` never fails; asking by name for what this machine lacks is an error that says why.
"""

import contextlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass

import torch

from chargpt.config import TrainConfig, TransformerConfig
from chargpt.errors import ConfigError
from chargpt.kernels import native, resolve

# Training steps in bf16 against fp32 on two Zen 4 cores: 0.7 times as fast with 32 channels, 1.4 with 64, 1.6 with 128,
# 2.2 with 384. nanogpt-cpu ended 0.0017 nats higher (three paired seeds, ± 0.0005), where seeds spread by 0.006.
NARROWEST_FOR_BF16 = 64


@dataclass(frozen=True)
class Runtime:
    """What was chosen, and a line for each choice that says why."""

    device: torch.device
    precision: str  # fp32 or bf16 (autocast; weights and optimizer stay fp32)
    compile: bool
    cuda_graph: bool
    backend: str  # who computes attention and cross-entropy, both joined by + where they differ
    reasons: tuple[str, ...]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def synchronize(self) -> None:
        """Wait for work that a GPU still has queued, so that a clock read now is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def resolve_runtime(config: TrainConfig) -> Runtime:
    """Decide what `config` leaves to `auto`. Raises ConfigError where something asked for is not here."""
    device, device_reason = _device(config.device)
    precision, precision_reason = _precision(config, device)
    compiled, compile_reason = _compile(config, device)
    graphed, graph_reason = _cuda_graph(config, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    attention = resolve("causal_attention", device, dtype, config.backend)
    cross_entropy = resolve("softmax_cross_entropy", device, dtype, config.backend)
    return Runtime(
        device,
        precision,
        compiled,
        graphed,
        attention.name if attention.name == cross_entropy.name else f"{attention.name}+{cross_entropy.name}",
        (
            f"device {device}: {device_reason}",
            f"precision {precision}: {precision_reason}",
            f"compile {'on' if compiled else 'off'}: {compile_reason}",
            f"cuda_graph {'on' if graphed else 'off'}: {graph_reason}",
            *dict.fromkeys(f"backend {choice.name}: {choice.reason}" for choice in (attention, cross_entropy)),
        ),
    )


def device_name(device: torch.device) -> str:
    """The name that the maker gave the device, for logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def resolve_device(wanted: str) -> torch.device:
    """The device that `wanted` (auto, cpu, cuda, cuda:N) names. Raises ConfigError when it is not here."""
    return _device(wanted)[0]


def _device(wanted: str) -> tuple[torch.device, str]:
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), "a CUDA GPU is here"
        return torch.device("cpu"), "no CUDA GPU is here"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {wanted!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {wanted!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f"device {wanted} was asked for, but torch {torch.__version__} sees {count} CUDA GPUs; use auto"
        )
    return device, "asked for"


def _precision(config: TrainConfig, device: torch.device) -> tuple[str, str]:
    if config.precision != "auto":
        return config.precision, "asked for"
    if device.type == "cpu":
        return _cpu_precision(config)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU multiplies bf16 on tensor cores"
    return "fp32", "the GPU has no bf16 tensor cores"


def _cpu_precision(config: TrainConfig) -> tuple[str, str]:
    module = native.load().module
    if module is None or config.backend == "torch":
        return "fp32", "the default on a CPU without the C++ kernels"
    if not module.cpu_features()["avx512_bf16"]:
        return "fp32", "the CPU has no instructions for bf16"
    if not isinstance(config.model, TransformerConfig) or config.model.n_embd < NARROWEST_FOR_BF16:
        return "fp32", f"below {NARROWEST_FOR_BF16} channels converting to bf16 costs more than it gains"
    return "bf16", "the CPU multiplies bf16 twice as fast, and the loss changes less than from seed to seed"


def _compile(config: TrainConfig, device: torch.device) -> tuple[bool, str]:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # that torch's inductor calls
    missing = None if shutil.which(compiler) else f"the C++ compiler {compiler} is not installed"
    if config.compile == "always" and missing is not None:
        raise ConfigError(f"compile always was asked for, but {missing}; install it, set CXX, or use auto")
    if config.compile == "always" and config.recompute:
        raise ConfigError(
            "compile always was asked for, but a compiler decides itself what it computes again: not with recompute"
        )
    if config.compile != "auto":
        return config.compile == "always", "asked for"
    if config.recompute:
        return False, "blocks are computed again as they are"
    if device.type == "cuda":
        return missing is None, missing or "it fuses the small operations around the kernels"
    return False, "on a CPU compiling takes longer than short runs gain"


def _cuda_graph(config: TrainConfig, device: torch.device) -> tuple[bool, str]:
    why_not = None
    if device.type != "cuda":
        why_not = "only a CUDA GPU has graphs"
    elif config.optimizer.kind != "adamw":
        why_not = f"{config.optimizer.kind} takes its learning rate from the host"
    elif config.recompute:
        why_not = "what is computed again draws its dropout from a state that the host keeps"
    if config.cuda_graph == "always" and why_not is not None:
        raise ConfigError(f"cuda_graph always was asked for, but {why_not}; use auto")
    if config.cuda_graph != "auto":
        return config.cuda_graph == "always", "asked for"
    return why_not is None, why_not or "a whole step is one launch, so the GPU does not wait for the host"
