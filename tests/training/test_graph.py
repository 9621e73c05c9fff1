"""A step as a CUDA graph does what the step itself does. Nothing is recorded here: the GPU's checks do that."""

import dataclasses
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from chargpt.config import TrainConfig, override
from chargpt.data import build_batches
from chargpt.errors import ConfigError, RunInterruptedError
from chargpt.models import build_model
from chargpt.runtime import Runtime, device, resolve_runtime
from chargpt.training import graph, trainer
from chargpt.training.optim import build_optimizers

# Learning rates that float32 holds exactly, since a graph keeps them there.
EXACT = ["schedule.kind=constant", "optimizer.learning_rate=0.0078125", "schedule.warmup_steps=3"]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[graph.Step]:
    """The steps that were recorded: called again, they run once more on what they hold."""
    found: list[graph.Step] = []

    def record(step: graph.Step) -> graph.Step:
        found.append(step)
        return step

    def with_graph(config: TrainConfig) -> Runtime:
        return dataclasses.replace(resolve_runtime(config), cuda_graph=True)

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "run_aside", lambda step: step())
    monkeypatch.setattr(trainer, "resolve_runtime", with_graph)
    return found


@pytest.mark.parametrize("case", ["transformer-adamw-random-accumulated-ema", "bigram-adamw-epoch"])
def test_a_recorded_run_ends_with_the_same_bits(
    case: str, recorded: list[graph.Step], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, aside = override(runs.CASES[case], EXACT), []

    def run_aside(step: graph.Step) -> tuple[torch.Tensor, torch.Tensor]:
        aside.append(len(recorded))
        return step()

    monkeypatch.setattr(graph, "run_aside", run_aside)
    runs.train(tmp_path / "graph", config)
    assert len(recorded) == 1
    assert aside == [0] * graph.WARM_UP
    monkeypatch.setattr(trainer, "resolve_runtime", resolve_runtime)
    runs.train(tmp_path / "eager", config)
    assert runs.result(tmp_path / "graph") == runs.result(tmp_path / "eager")


def test_a_resumed_run_records_again_and_ends_with_the_same_bits(recorded: list[graph.Step], tmp_path: Path) -> None:
    config = override(runs.TRANSFORMER, [*EXACT, "max_steps=12"])
    for name, stops in (("whole", []), ("resumed", [5])):
        for stop_at in [*stops, None]:
            one = trainer.Trainer(runs.make_run(tmp_path / name, config))
            try:
                one.train(stop=lambda one=one, at=stop_at: "a test" if one.state.step == at else None)
            except RunInterruptedError:
                assert one.state.step == stop_at
    assert len(recorded) == 3
    for name in ("model.safetensors", "state.safetensors"):
        assert runs.sha256(tmp_path / "whole/last" / name) == runs.sha256(tmp_path / "resumed/last" / name)


def test_only_adamw_on_a_gpu_is_recorded() -> None:
    muon = override(runs.TRANSFORMER, ["optimizer.kind=muon"])
    assert not resolve_runtime(runs.TRANSFORMER).cuda_graph
    with pytest.raises(ConfigError, match="cuda_graph always was asked for, but only a CUDA GPU has graphs; use auto"):
        resolve_runtime(override(runs.TRANSFORMER, ["cuda_graph=always"]))
    gpu = torch.device("cuda")
    assert device._cuda_graph(runs.TRANSFORMER, gpu)[0]
    assert device._cuda_graph(override(runs.TRANSFORMER, ["cuda_graph=never"]), gpu) == (False, "asked for")
    assert device._cuda_graph(muon, gpu) == (False, "muon takes its learning rate from the host")
    again = override(runs.TRANSFORMER, ["recompute=true"])
    assert device._cuda_graph(again, gpu) == (
        False,
        "what is computed again draws its dropout from a state that the host keeps",
    )
    with pytest.raises(ConfigError, match="muon takes"):
        device._cuda_graph(override(muon, ["cuda_graph=always"]), gpu)


def test_a_recording_keeps_the_model_whose_memory_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(step: graph.Step) -> graph.Step:
        loss, norm = step()
        return lambda: (loss.clone(), norm.clone())  # as a graph: without a reference to the model

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "run_aside", lambda step: step())
    model = build_model(runs.BIGRAM.model, 10, seed=1, backend="torch")
    kept = weakref.ref(model)
    tokens = np.arange(200, dtype=np.uint8) % 10
    batches = build_batches("random", tokens, runs.BIGRAM.batch_size, 8, seed=1)
    optimizers = build_optimizers(model, runs.BIGRAM.optimizer)
    step = graph.GraphedStep(model, optimizers, batches, runs.BIGRAM, resolve_runtime(runs.BIGRAM))
    del model, optimizers
    for _ in range(graph.WARM_UP + 2):
        step()
    gc.collect()
    assert kept() is not None
