"""`chargpt train`: a model of any text."""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chargpt.cli.parsing import DEVICES, Commands, command

if TYPE_CHECKING:
    from chargpt.data import Splits
    from chargpt.training import Run

EXAMPLES = """examples:
  chargpt train my.txt                          a minute or two; the run goes to runs/my
  chargpt train my.txt --minutes 15             the same command goes on after Ctrl-C
  chargpt train poems/ --preset cpu-best --set model.dropout=0.2 --out runs/poems-2
  chargpt train my.txt --set model.kind=bigram --set max_steps=3000
  chargpt train my.txt --config variant.yaml    exactly this, fitted to nothing
  chargpt train my.txt --out runs/student --teacher runs/my-1 runs/my-2 runs/my-3

Without --config, a preset is fitted to the text, this machine and the time; each choice is printed with its reason.
What --set names stays as you set it."""


def add(commands: Commands) -> None:
    train = command(
        commands, "train", run, EXAMPLES, "Train a character-level model on a text; go on where a stopped run was."
    )
    train.add_argument("text", help="a text file, or a folder of text files")
    train.add_argument("--out", type=Path, help="the run's folder (default: runs/<name of the text>)")
    train.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="time to train; it also chooses the preset (default: the preset's time)",
    )
    base = train.add_mutually_exclusive_group()
    base.add_argument("--preset", metavar="NAME", help="nanogpt-cpu, modern or cpu-best (default: by the minutes)")
    base.add_argument("--config", type=Path, help="YAML with the fields of one variant of params.yaml, taken as it is")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one knob, as in model.n_layer=6; repeat"
    )
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
    train.add_argument("--seed", type=int, default=1, help="of weights, batches and dropout (default: %(default)s)")
    train.add_argument("--val-fraction", type=float, help="last part of the text to validate on (default: a tenth)")
    train.add_argument("--encoding", default="utf-8", help="of the text (default: %(default)s)")
    train.add_argument("--track", action="store_true", help="log the run to MLflow (needs chargpt[pipeline])")


def run(arguments: argparse.Namespace) -> None:
    from chargpt.config import EvaluationConfig, TrackingConfig, load_train_config
    from chargpt.config.presets import PRESETS
    from chargpt.console import say
    from chargpt.planner import Request, Text, budgeted, choose_preset, fit
    from chargpt.planner.machine import measured_machine
    from chargpt.runtime import resolve_device
    from chargpt.training import Run, require_unfinished, train

    assignments = (*arguments.set, *([] if arguments.device is None else [f"device={arguments.device}"]))
    request = Request(arguments.preset, arguments.minutes, assignments, len(arguments.teacher))
    # Mistakes in the command show here, before the text is read.
    start = load_train_config(arguments.config) if arguments.config else PRESETS[choose_preset(request, gpu=False)[0]]
    config = budgeted(start, request)
    device = resolve_device(config.device)
    name = Path(arguments.text).resolve().stem
    folder = arguments.out or Path("runs") / name
    require_unfinished(folder)
    splits = _splits_of_text(arguments)
    run = Run(config.model.kind, arguments.seed, config, splits, name, folder, tuple(arguments.teacher))
    if arguments.config is None:
        with measured_machine(run, device) as machine:
            fitted = fit(request, Text(len(splits.train), len(splits.val), splits.tokenizer.vocab_size), machine)
        for reason in fitted.reasons:
            say(reason)
        run = dataclasses.replace(run, variant=fitted.name, config=fitted.config)
    # The other protocols would cost minutes; `chargpt eval` has them.
    metrics = train(run, EvaluationConfig(), TrackingConfig(enabled=arguments.track), protocols=("full",))
    print("\n".join(_result(run, metrics)))


def _splits_of_text(arguments: argparse.Namespace) -> "Splits":
    from chargpt.config import SplitConfig, TokenizerConfig
    from chargpt.console import say
    from chargpt.data import require_size, split_tokens
    from chargpt.planner import validation_fraction
    from chargpt.text import read_text
    from chargpt.tokenizers import build_tokenizer

    given = None if arguments.val_fraction is None else SplitConfig(arguments.val_fraction).val_fraction
    text = read_text(arguments.text, arguments.encoding)
    tokenizer = build_tokenizer(TokenizerConfig(), text)
    fraction, reason = (given, "asked for") if given is not None else validation_fraction(len(text))
    splits = split_tokens(tokenizer.encode(text), tokenizer, fraction)
    require_size(splits, 1)
    say(
        f"text {arguments.text}: {len(text):,} characters, {tokenizer.vocab_size:,} of them different; "
        f"the last {len(splits.val):,} are for validation ({reason})"
    )
    return splits


def _result(run: "Run", metrics: dict[str, Any]) -> Iterator[str]:
    """What a user wants to know at the end: the loss, what it means, what a guess would lose, and how to sample."""
    from chargpt.evaluation import guess_losses

    loss = metrics["val_full"]
    yield (
        f"validation loss {loss:.4f} nats per character ({loss / math.log(2):.3f} bits) at step {metrics['best_step']} "
        f"of {metrics['steps']}, in {run.folder}"
    )
    yield f"that is as if each character were a choice among {math.exp(loss):.2f}; guesses without a model lose:"
    for guess, value in guess_losses(run.splits).items():
        yield f"  {value:.4f} nats ({value / math.log(2):.3f} bits) {guess}"
    yield f"sample it: chargpt sample {run.folder} --stream"
