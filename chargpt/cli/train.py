"""`chargpt train`: a model of any text."""

import argparse
import dataclasses
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chargpt.cli.parsing import DEVICES, Commands, command
from chargpt.errors import ConfigError

if TYPE_CHECKING:
    from chargpt.config import TrackingConfig, TrainConfig
    from chargpt.data import Splits
    from chargpt.planner import Request
    from chargpt.training import Run

EXAMPLES = """examples:
  chargpt train my.txt                          a minute or two; the run goes to runs/my
  chargpt train my.txt --minutes 15             the same command resumes after Ctrl-C
  chargpt train poems/ --preset cpu-best --set model.dropout=0.2 --out runs/poems-2
  chargpt train my.txt --set model.kind=bigram --set max_steps=3000
  chargpt train my.txt --like runs/my --set model.n_layer=6 --out runs/my-6    that run with one knob changed
  chargpt train my.txt --config variant.yaml    exactly this, without any adjustment
  chargpt train my.txt --out runs/student --teacher runs/my-1 runs/my-2 runs/my-3

Without --config and --like a preset is adjusted to your text, computer and time; each choice is printed with its
reason. What --set names stays as you set it. A run is a number of steps: --minutes measures the speed once, when the
run begins, and counts them."""


def add(commands: Commands) -> None:
    train = command(commands, "train", run, EXAMPLES, "Train a model on a text, or resume a run that was stopped.")
    train.add_argument("text", help="a text file, or a folder of text files")
    train.add_argument("--out", type=Path, help="the run's folder (default: runs/<name of the text>)")
    train.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="time to train; it also chooses the preset (default: the preset's steps)",
    )
    base = train.add_mutually_exclusive_group()
    base.add_argument("--preset", metavar="NAME", help="nanogpt-cpu, modern or cpu-best (default: by the minutes)")
    base.add_argument("--config", type=Path, help="YAML with the fields of one variant of params.yaml, not adjusted")
    base.add_argument("--like", type=Path, metavar="RUN", help="that run's config, tokenizer and seed, not adjusted")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one knob, as in model.n_layer=6; repeat"
    )
    train.add_argument("--tokenizer", metavar="KIND", help="character or byte (default: character, or --like's)")
    train.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="learn what these runs on the same text predict together (distillation), in place of the text itself; "
        "after the text on the command line",
    )
    train.add_argument("--device", help=f"{DEVICES}, as --set device=… (default: the preset's, auto)")
    train.add_argument("--seed", type=int, help="of weights, batches and dropout (default: 1, or as --like has it)")
    train.add_argument("--val-fraction", type=float, help="last part of the text to validate on (default: a tenth)")
    train.add_argument("--encoding", default="utf-8", help="of the text (default: %(default)s)")
    train.add_argument("--track", action="store_true", help="log the run to MLflow (needs chargpt[pipeline])")


def run(arguments: argparse.Namespace) -> None:
    from chargpt import experiment
    from chargpt.config import EvaluationConfig, TrackingConfig
    from chargpt.console import say
    from chargpt.planner import Request
    from chargpt.training import Run

    assignments = (*arguments.set, *([] if arguments.device is None else [f"device={arguments.device}"]))
    request = Request(arguments.preset, arguments.minutes, assignments, len(arguments.teacher))
    path = Path(os.path.abspath(arguments.text))  # links keep their own names
    name = path.name if path.is_dir() else path.stem
    folder = arguments.out or Path("runs") / name
    name = os.fsencode(name).decode("utf-8", "replace")  # for people, and for files in UTF-8
    # Mistakes in the command show here, before the text is read.
    config, variant = _first_config(arguments, request)
    experiment.require_unfinished(folder)
    splits = _splits_of_text(arguments)
    seed = arguments.seed if arguments.seed is not None else _like(arguments.like, "seed", 1)
    run = Run(variant, seed, config, splits, name, folder, tuple(arguments.teacher))
    if os.path.lexists(folder / "last"):
        run = _as_it_began(run, arguments, request)
    elif arguments.config is None and arguments.like is None:
        run = _adjusted(run, request)
    elif arguments.minutes is not None:
        run = _with_steps_for(run, arguments.minutes)
    if arguments.like is not None and _like(arguments.like, "data", None) != splits.fingerprint:
        say(f"{arguments.like} was trained on another text, or another split of it: the losses do not compare")
    tracking = TrackingConfig(enabled=arguments.track)
    metrics = experiment.train(
        run,
        EvaluationConfig(),
        tracking,
        protocols=("full",),  # the others would cost minutes; `chargpt eval` has them
        data=folder.parent / "data",
        minutes=arguments.minutes,
    )
    print("\n".join(_result(run, metrics)))
    if arguments.track:
        print("\n".join(_where_tracked(tracking)))


# ---------------------------------------------------------------------------------------------------------- the config


def _first_config(arguments: argparse.Namespace, request: "Request") -> "tuple[TrainConfig, str]":
    """The config before anything is adjusted, and its name."""
    from chargpt.config import load_train_config
    from chargpt.config.presets import PRESETS
    from chargpt.experiment import CONFIG
    from chargpt.planner import assigned, choose_preset
    from chargpt.runtime import resolve_device

    if arguments.config is not None:
        config, name = load_train_config(arguments.config), None
    elif arguments.like is not None:
        config, name = (
            load_train_config(_run_folder(arguments.like) / CONFIG),
            _like(arguments.like, "variant", ""),
        )
    else:
        name = choose_preset(request, gpu=False)[0]
        config = PRESETS[name]
    config = assigned(config, request)
    resolve_device(config.device)
    return config, name or config.model.kind


def _run_folder(path: Path) -> Path:
    from chargpt.experiment import CONFIG

    if not (path / CONFIG).is_file():
        raise ConfigError(f"--like {path}: that is no folder of a run (no {CONFIG} in it)")
    return path


def _like(path: Path | None, key: str, default: Any) -> Any:
    """What the checkpoint of the run that --like names says about itself."""
    from chargpt.checkpoint import read_description

    return default if path is None else read_description(path)["summary"].get(key, default)


def _as_it_began(run: "Run", arguments: argparse.Namespace, request: "Request") -> "Run":
    """A run that resumes has the config it began with, under --set: the trainer refuses what differs."""
    from chargpt.checkpoint import read_description
    from chargpt.config import load_train_config, override
    from chargpt.experiment import CONFIG

    if arguments.config is not None:
        return run
    began = read_description(run.folder / "last")["summary"]["variant"]
    if arguments.preset not in (None, began):
        raise ConfigError(
            f"{run.folder} holds a run of {began}, and --preset {arguments.preset} asks for another; choose another "
            f"folder (--out), or leave out --preset to resume it"
        )
    config = override(load_train_config(run.folder / CONFIG), list(request.assignments))
    return dataclasses.replace(run, variant=began, config=config)


def _adjusted(run: "Run", request: "Request") -> "Run":
    """The preset, adjusted to the text, this machine and the time."""
    from chargpt.config import differences, flatten
    from chargpt.console import say
    from chargpt.planner import Text, fit, this_machine
    from chargpt.runtime import resolve_device

    splits = run.splits
    text = Text(len(splits.train), len(splits.val), splits.tokenizer.vocab_size)
    machine = this_machine(run, resolve_device(run.config.device))
    fitted = fit(request, text, machine)
    for reason in fitted.reasons:
        say(reason)
    mine = {assignment.partition("=")[0] for assignment in request.assignments}
    if mine - {"device"} and not request.teachers:  # a teacher may not fit the preset as it is
        without = fit(dataclasses.replace(request, assignments=()), text, machine).config
        moved = [
            line
            for line in differences(flatten(without), flatten(fitted.config))
            if line.partition(":")[0] not in mine and not (line.startswith("model.") and "model.kind" in mine)
        ]
        if moved:
            say(f"because of --set these were chosen otherwise: {'; '.join(moved)}; --like RUN changes nothing else")
    return dataclasses.replace(run, variant=fitted.name, config=fitted.config)


def _with_steps_for(run: "Run", minutes: float) -> "Run":
    from chargpt.console import say
    from chargpt.planner import steps_in
    from chargpt.training import measure_speed

    steps = steps_in(minutes, run.config, measure_speed(run))
    say(f"max_steps {steps:,}: what {minutes:g} min of training hold at the speed measured now")
    return dataclasses.replace(run, config=dataclasses.replace(run.config, max_steps=steps))


# ------------------------------------------------------------------------------------------------------------ the text


def _splits_of_text(arguments: argparse.Namespace) -> "Splits":
    from chargpt.checkpoint import TOKENIZER, find_checkpoint
    from chargpt.config import SplitConfig, TokenizerConfig, override
    from chargpt.console import say
    from chargpt.data import require_size, split_tokens
    from chargpt.planner import validation_fraction
    from chargpt.text import read_text
    from chargpt.tokenizers import build_tokenizer, load_tokenizer

    given = None if arguments.val_fraction is None else SplitConfig(arguments.val_fraction).val_fraction
    kind = arguments.tokenizer
    if kind is None and arguments.like is not None:
        kind = load_tokenizer(find_checkpoint(arguments.like) / TOKENIZER).kind
    config = TokenizerConfig() if kind is None else override(TokenizerConfig(), [f"kind={kind}"])
    text = read_text(arguments.text, arguments.encoding)
    tokenizer = build_tokenizer(config, text)
    ids = tokenizer.encode(text)
    fraction, reason = (given, "asked for") if given is not None else validation_fraction(len(ids))
    splits = split_tokens(ids, tokenizer, fraction)
    require_size(splits, 1)
    say(
        f"text {arguments.text}: {len(text):,} characters, {len(ids):,} tokens of {tokenizer.vocab_size:,} symbols "
        f"({tokenizer.kind}); the last {len(splits.val):,} are for validation ({reason})"
    )
    return splits


# ---------------------------------------------------------------------------------------------------------- the result


def _result(run: "Run", metrics: dict[str, Any]) -> Iterator[str]:
    """What a user wants to know at the end: the loss, what it means, what a guess would lose, and how to sample."""
    from chargpt.console import loss_text
    from chargpt.evaluation import guess_losses

    loss, bytes_per_token = metrics["val_full"], run.splits.val_bytes_per_token
    yield (
        f"validation loss {loss_text(loss, bytes_per_token)} in nats per token, at step {metrics['best_step']} of "
        f"{metrics['steps']}, in {run.folder}"
    )
    yield (
        f"that is as uncertain as guessing among {math.exp(loss):.2f} equally likely tokens; guesses without a model "
        f"lose:"
    )
    for guess, value in guess_losses(run.splits).items():
        yield f"  {loss_text(value, bytes_per_token)} {guess}"
    yield f"sample it: chargpt sample {run.folder} --stream"


def _where_tracked(tracking: "TrackingConfig") -> Iterator[str]:
    from chargpt.tracking import store_uri, ui_command

    yield f"tracked in MLflow: {store_uri(tracking)}, experiment {tracking.experiment}"
    yield f"look at it: {shlex.join(ui_command(tracking))}"
