"""What a run leaves on disk.

format.py   a checkpoint: a sealed folder
folder.py   a run's folder of checkpoints
"""

from chargpt.checkpoint.folder import checkpoint_name, list_checkpoint, locked, point_to, remove_unreferenced
from chargpt.checkpoint.format import (
    STATE,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    Tensors,
    damage,
    export_checkpoint,
    find_checkpoint,
    load_ensemble,
    load_model,
    load_state,
    read_checkpoint,
    read_description,
    require_same_data,
    require_tensors,
    save_checkpoint,
)

__all__ = [
    "STATE",
    "TOKENIZER",
    "WEIGHTS",
    "Checkpoint",
    "Tensors",
    "checkpoint_name",
    "damage",
    "export_checkpoint",
    "find_checkpoint",
    "list_checkpoint",
    "load_ensemble",
    "load_model",
    "load_state",
    "locked",
    "point_to",
    "read_checkpoint",
    "read_description",
    "remove_unreferenced",
    "require_same_data",
    "require_tensors",
    "save_checkpoint",
]
