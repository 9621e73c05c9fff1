"""This machine, as the planner asks about it."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from chargpt.config import TrainConfig
from chargpt.files import replaced_file
from chargpt.planner.fit import Machine, Speed
from chargpt.runtime import available_memory

if TYPE_CHECKING:
    from chargpt.training import Run


@contextlib.contextmanager
def measured_machine(run: "Run", device: torch.device) -> Iterator[Machine]:
    """This machine, as `fit` asks about it. A run that goes on gets the answers it got when it began."""
    from chargpt.training import measure_speed

    path = run.folder / "machine.json"
    goes_on = os.path.lexists(run.folder / "last")
    known: dict[str, Any] = {"memory": available_memory(device), "speeds": []}
    if goes_on:
        with contextlib.suppress(OSError, ValueError):  # a run that was not fitted, or by hand: measured again
            known = json.loads(path.read_text(encoding="utf-8"))

    def speed(config: TrainConfig) -> Speed:
        wanted = {"model": dataclasses.asdict(config.model), "batch_size": config.batch_size}
        for measured in known["speeds"]:
            if measured["of"] == wanted:
                return Speed(measured["training"], measured["evaluation"])
        found = measure_speed(dataclasses.replace(run, config=config))
        known["speeds"].append({"of": wanted, **dataclasses.asdict(found)})
        return found

    yield Machine(device.type == "cuda", known["memory"], speed)
    if not goes_on:
        run.folder.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as file:
            file.write(json.dumps(known, indent=1).encode())
