"""This machine, as the planner asks about it."""

import dataclasses

import torch

from chargpt.config import TrainConfig
from chargpt.planner.fit import Machine
from chargpt.runtime import available_memory
from chargpt.training import Run, Speed, measure_speed


def this_machine(run: Run, device: torch.device) -> Machine:
    """What is free here, and how fast `run` would be under a config: tried once for each model and batch size."""
    known: dict[str, Speed] = {}

    def speed(config: TrainConfig) -> Speed:
        tried = repr((config.model, config.batch_size))
        if tried not in known:
            known[tried] = measure_speed(dataclasses.replace(run, config=config))
        return known[tried]

    return Machine(device.type == "cuda", available_memory(device), speed)
