"""The training loop: a state, a step that moves it, and a checkpoint that holds all of it.

The one idea to know: training is a function of its config alone. There is no clock in it; evaluation, saving and
whoever listens to its events read the state and touch none of its random streams, so a run that was killed and resumed
ends with the same bits as one that was not.
"""

import dataclasses
import math
import os
import typing
from collections.abc import Callable, Sequence
from functools import partial

import torch

from chargpt import checkpoint
from chargpt.config import differences
from chargpt.data import require_known, require_size
from chargpt.errors import CheckpointError, RunInterruptedError, TrainingError
from chargpt.evaluation import full_loss
from chargpt.models import Model
from chargpt.runtime import available_memory, resolve_runtime
from chargpt.training.events import Ended, Evaluated, Event, Point, Saved, Saving, Started, Stepped, Subscriber
from chargpt.training.graph import GraphedStep
from chargpt.training.memory import require_memory
from chargpt.training.optim import set_learning_rate
from chargpt.training.state import Run, load_state_tensors, new_state, state_tensors
from chargpt.training.steps import current_learning_rate_scale, overfits, patience_lost, training_step


class Trainer:
    """A run, its state, and the machine it runs on.

    It begins where the last checkpoint of the run's folder is, if there is one. Raises CorpusError (too few tokens, or
    ids that the tokenizer does not have),
    ConfigError (a device or kernel that cannot run here), TrainingError (too little memory), CheckpointError (the last
    checkpoint is damaged, or of another config).
    """

    def __init__(self, run: Run) -> None:
        require_size(run.splits, run.config.model.block_size)
        require_known(run.splits.val_with_context, run.splits.tokenizer.vocab_size)
        self.run, self.runtime = run, resolve_runtime(run.config)
        require_memory(run.config, run.splits.tokenizer.vocab_size, available_memory(self.runtime.device))
        self.state = new_state(run, self.runtime)
        self.resumed = os.path.lexists(run.folder / "last")  # a link that leads nowhere is damage, not a new run
        if self.resumed:
            self._resume()

    def train(self, subscribers: Sequence[Subscriber] = (), stop: Callable[[], str | None] = lambda: None) -> None:
        """Steps until the budget or the patience is spent, with evaluations and checkpoints where they are due.

        stop: asked after each step; a text, which says who asked, ends the run with everything saved

        Raises TrainingError (loss or weights not finite), RunInterruptedError (`stop` said so).
        """
        self._subscribers = subscribers
        state, config = self.state, self.run.config
        model = typing.cast(Model, torch.compile(state.model)) if self.runtime.compile else state.model
        parts = (model, state.optimizers, state.batches, config, self.runtime, state.teacher)
        step = GraphedStep(*parts) if self.runtime.cuda_graph else partial(training_step, *parts)
        state.model.train()
        self._tell(Started(state.step, config.max_steps))
        if state.history:
            self._save()  # what a kill may have cut short: links, and what subscribers write
        else:
            self._evaluate_and_save()
        asked = None
        while not (state.step >= config.max_steps or patience_lost(state, config) or asked):
            set_learning_rate(state.optimizers, current_learning_rate_scale(state.step, config))
            loss, norm = step()
            if state.average is not None:
                state.average.update_parameters(state.model)
            state.losses.append(loss)
            state.step += 1
            evaluate = state.step % config.eval_interval == 0 or state.step >= config.max_steps
            if evaluate or state.step % config.log_interval == 0:
                self._record(torch.stack(state.losses).mean().item(), norm.item())  # waits for the GPU
            asked = stop()  # read once: a signal may come at any moment
            if evaluate:
                self._evaluate_and_save()
            elif asked:
                self._save()
        assert state.best is not None
        if asked:
            self._tell(Ended(state.step, "interrupted", state.best))
            raise RunInterruptedError(
                f"stopped at step {state.step} by {asked}; everything is saved in {self.run.folder}, "
                f"and the same command goes on from there"
            )
        self._tell(Ended(state.step, "patience" if patience_lost(state, config) else "steps", state.best))

    def _tell(self, event: Event) -> None:
        for subscriber in self._subscribers:
            subscriber(event)

    def _record(self, loss: float, norm: float) -> None:
        """Add a point to the curve. Raises TrainingError unless all is finite."""
        state, per_step = self.state, self.run.config.tokens_per_step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(f"the training loss became {loss} (gradient norm {norm})")
        metrics = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/learning_rate": float(state.optimizers[0].param_groups[0]["lr"]),
            "train/tokens": float(state.step * per_step),
        }
        state.history.append(Point(state.step, metrics))
        self._tell(Stepped(state.step, len(state.losses) * per_step, loss))
        state.losses.clear()

    def _evaluate_and_save(self) -> None:
        run, state = self.run, self.state
        with self.runtime.autocast():
            scored = run.config.eval_tokens
            part = run.splits.val_with_context[: None if scored is None else 1 + scored]
            loss = full_loss(state.delivered, part, self.runtime.device)
        if not math.isfinite(loss):
            raise self._not_finite(f"the validation loss became {loss}")
        tokens = float(state.step * run.config.tokens_per_step)
        # A chart of the loss takes a metric for its x axis only from the same steps.
        state.history.append(Point(state.step, {"val/loss": loss, "val/tokens": tokens}))
        if state.best is None or loss < state.best[1]:
            state.best = (state.step, loss)
        self._tell(Evaluated(state.step, loss, state.best, overfits(state.history)))
        self._save()

    def _not_finite(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} by step {self.state.step}; the last good checkpoint is {(self.run.folder / 'last').resolve()}. "
            f"Lower the learning rate or set grad_clip, and train in another folder"
        )

    def _save(self) -> None:
        """A checkpoint of everything. Raises TrainingError for weights that are not finite: the last is a good one."""
        run, state = self.run, self.state
        if not all(parameter.isfinite().all() for parameter in state.model.parameters()):
            raise self._not_finite("weights became infinite or not a number")
        if len(state.history) > 1 and not run.folder.is_dir():
            raise TrainingError(f"{run.folder} was deleted or moved while the run trained, which ends here")
        self._tell(Saving(state.step))
        name = checkpoint.checkpoint_name(state.step)
        checkpoint.list_checkpoint(run.folder, name)
        if not (run.folder / name).exists():  # the step a run was resumed at is saved already
            checkpoint.save_checkpoint(
                run.folder / name,
                state.delivered,
                run.splits.tokenizer,
                summary={
                    "variant": run.variant,
                    "seed": run.seed,
                    "step": state.step,
                    "corpus": run.corpus,
                    "batch_size": run.config.batch_size,
                    "data": run.splits.fingerprint,
                    "train_tokens": len(run.splits.train),
                },
                state=state_tensors(state),
                training={
                    "identity": run.identity(self.runtime),
                    "step": state.step,
                    "history": [dataclasses.astuple(point) for point in state.history],
                    "best": state.best,
                },
            )
        checkpoint.point_to(run.folder, "last", name)
        if state.best is not None and state.best[0] == state.step:
            checkpoint.point_to(run.folder, "best", name)
        checkpoint.remove_unreferenced(run.folder)
        self._tell(Saved(state.step, state.history))

    def _resume(self) -> None:
        """Take over the last checkpoint. Raises CheckpointError when it is damaged or of another config."""
        state, last = self.state, self.run.folder / "last"
        weights, tensors, training = checkpoint.load_state(last)
        with checkpoint.damage(last):
            changed = differences(training["identity"], self.run.identity(self.runtime))
            if changed:
                raise CheckpointError(
                    f"{self.run.folder} holds a run under another config, which cannot go on under this one; train in "
                    f"another folder, or set back what changed:\n  " + "\n  ".join(changed)
                )
            if training["step"] > self.run.config.max_steps:
                raise ValueError(f"step {training['step']} is beyond the {self.run.config.max_steps} of the run")
            load_state_tensors(state, weights, tensors, training["step"] > 0, last)
            state.step = training["step"]
            state.history = [Point(*point) for point in training["history"]]
            state.best = tuple(training["best"])
