"""Learning from trained models: a student that predicts what their ensemble predicts, not only what the text says.

Members of an ensemble err in different ways, and their mean probability tells how likely each other symbol would have
been. A student that learns it comes close to the ensemble at the cost of one model. The teachers must have been trained
on the student's training part alone: one that had seen the validation part would make its loss a lie.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from chargpt import checkpoint
from chargpt.data import Splits
from chargpt.errors import CheckpointError
from chargpt.models import LanguageModel


def load_teachers(
    paths: Sequence[Path], splits: Splits, block_size: int, device: torch.device, backend: str = "auto"
) -> LanguageModel:
    """The models at `paths` as one, in evaluation mode, for a student with `block_size` and the data of `splits`.

    Raises CheckpointError when one is missing or damaged, was trained on other data, or reads less than `block_size`.
    """
    for path in paths:
        checkpoint.require_same_data(path, splits.fingerprint)
    teachers, _ = checkpoint.load_ensemble(paths, device, backend)
    if teachers.block_size < block_size:
        raise CheckpointError(
            f"the teachers read {teachers.block_size} tokens and their student {block_size}; "
            f"set model.block_size={teachers.block_size}, or take other teachers"
        )
    return teachers.requires_grad_(False)


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy () in nats between the teachers' distribution and the student's, from logits (B, T, V) each.

    Hinton et al. 2015, arXiv 1503.02531, section 2, at temperature 1, in float32.
    """
    probabilities = teacher_logits.flatten(0, 1).float().softmax(-1)  # (B · T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), probabilities)
