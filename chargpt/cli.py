"""The command line for people without DVC: train on any text, sample, evaluate, and see what this machine offers."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chargpt import __version__
from chargpt.errors import ConfigError, CorpusError, TokenizerError, user_errors

if TYPE_CHECKING:
    import torch

    from chargpt.config import TrainConfig
    from chargpt.data import Splits, Tokens
    from chargpt.planner import Machine
    from chargpt.tokenizers import Tokenizer
    from chargpt.training import Run

EXAMPLES = {
    "train": """examples:
  chargpt train my.txt                          a minute or two; the run goes to runs/my
  chargpt train my.txt --minutes 15             the same command goes on after Ctrl-C
  chargpt train poems/ --preset cpu-best --set model.dropout=0.2 --out runs/poems-2
  chargpt train my.txt --set model.kind=bigram --set max_steps=3000
  chargpt train my.txt --config variant.yaml    exactly this, fitted to nothing
  chargpt train my.txt --out runs/student --teacher runs/my-1 runs/my-2 runs/my-3

Without --config, a preset is fitted to the text, this machine and the time; each choice is printed with its reason.
What --set names stays as you set it.""",
    "sample": """examples:
  chargpt sample runs/my --prompt "ROMEO:" --stream
  chargpt sample models/nanogpt-cpu-s1 --num-samples 3 --temperature 1.0 --top-p 0.95""",
    "eval": """examples:
  chargpt eval runs/my
  chargpt eval models/bigram-s1 --data data/splits --protocol full
  chargpt eval runs/my --text other.txt
  chargpt eval runs/my --protocol dynamic
  chargpt eval models/modern-s1 models/modern-s2 models/modern-s3    the three together""",
    "info": """examples:
  chargpt info
  chargpt info --json""",
}

CHECKPOINTS = "the folder of a run (its best checkpoint) or of a checkpoint; several predict together, by the mean"


def main() -> None:
    with user_errors():  # around the heavy imports too: Ctrl-C while they load is an ordinary stop
        arguments = build_parser().parse_args()
        arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chargpt", description="Turn any text into a small GPT.")
    parser.add_argument("--version", action="version", version=f"chargpt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    train = command("train", train_command, "Train a character-level model on a text; go on where a stopped run was.")
    train.add_argument("text", help="a text file, or a folder of text files")
    train.add_argument("--out", type=Path, help="the run's folder (default: runs/<name of the text>)")
    train.add_argument("--minutes", type=float, metavar="N", help="time to train; it also chooses the preset")
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
    train.add_argument("--seed", type=int, default=1, help="of weights, batches and dropout (default: 1)")
    train.add_argument("--val-fraction", type=float, help="last part of the text to validate on (default: a tenth)")
    train.add_argument("--encoding", default="utf-8", help="of the text (default: utf-8)")
    train.add_argument("--track", action="store_true", help="log the run to MLflow (needs chargpt[pipeline])")

    sample = command("sample", sample_command, "Generate text from a run or a checkpoint.")
    sample.add_argument("checkpoints", metavar="checkpoint", type=Path, nargs="+", help=CHECKPOINTS)
    sample.add_argument("--prompt", default="", help="text to go on from")
    sample.add_argument("--stream", action="store_true", help="print each token as it comes")
    sample.add_argument("--num-samples", type=int, default=1)
    sample.add_argument("--max-new-tokens", type=int, default=500)
    sample.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    sample.add_argument("--top-k", type=int, help="keep the k likeliest tokens")
    sample.add_argument("--top-p", type=float, help="keep the likeliest tokens that together have this probability")
    sample.add_argument("--seed", type=int, default=1337)
    sample.add_argument(
        "--unknown",
        choices=("strict", "replace", "skip"),
        default="strict",
        help="what to do with characters of the prompt that the model does not know (default: strict, an error)",
    )
    sample.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")

    evaluate = command(
        "eval", eval_command, "Loss of a run or a checkpoint, or of several together, in nats per token."
    )
    evaluate.add_argument("checkpoints", metavar="checkpoint", type=Path, nargs="+", help=CHECKPOINTS)
    source = evaluate.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, help="a folder with val.npy (default: the first run's own, else data/splits)"
    )
    source.add_argument("--text", help="score this text instead, every token after its first")
    evaluate.add_argument(
        "--protocol",
        choices=("full", "sliding", "nanogpt", "all", "dynamic"),
        default="all",
        help="how to score (default: all of the first three); dynamic learns from each window after scoring it",
    )
    evaluate.add_argument("--encoding", default="utf-8", help="of --text")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    info = command("info", info_command, "Versions, devices, and which kernels exist here and why the others do not.")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


# ------------------------------------------------------------------------------------------------------------ commands


def train_command(arguments: argparse.Namespace) -> None:
    from chargpt.config import EvaluationConfig, TrackingConfig, load_train_config
    from chargpt.config.presets import PRESETS
    from chargpt.console import say
    from chargpt.planner import Request, Text, budgeted, choose_preset, fit
    from chargpt.runtime import resolve_device
    from chargpt.training import Run, require_unfinished, train

    request = Request(arguments.preset, arguments.minutes, tuple(arguments.set), len(arguments.teacher))
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
        with _machine(run, device) as machine:
            fitted = fit(request, Text(len(splits.train), len(splits.val), splits.tokenizer.vocab_size), machine)
        for reason in fitted.reasons:
            say(reason)
        run = dataclasses.replace(run, variant=fitted.name, config=fitted.config)
    # The other protocols would cost minutes; `chargpt eval` has them.
    metrics = train(run, EvaluationConfig(), TrackingConfig(enabled=arguments.track), protocols=("full",))
    print("\n".join(_result(run, metrics)))


def sample_command(arguments: argparse.Namespace) -> None:
    from chargpt.checkpoint import load_ensemble
    from chargpt.config import SampleConfig
    from chargpt.generation import generate_text, stream_text
    from chargpt.runtime import resolve_device

    config = SampleConfig(
        num_samples=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        unknown=arguments.unknown,
        seed=arguments.seed,
    )
    if arguments.stream and config.num_samples != 1:
        raise ConfigError("--stream shows one sample; leave out --stream or --num-samples")
    device = resolve_device(arguments.device)
    model, tokenizer = load_ensemble(arguments.checkpoints, device)
    if arguments.stream:
        pieces = stream_text(model, tokenizer, arguments.prompt, config, device)
        print(arguments.prompt, end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
        return
    print("\n---\n".join(generate_text(model, tokenizer, arguments.prompt, config, device)))


def eval_command(arguments: argparse.Namespace) -> None:
    from chargpt.checkpoint import find_checkpoint, load_ensemble, read_description
    from chargpt.config import EvaluationConfig
    from chargpt.evaluation import PROTOCOLS, evaluate
    from chargpt.runtime import resolve_device

    device = resolve_device(arguments.device)
    model, tokenizer = load_ensemble(arguments.checkpoints, device)
    if arguments.text is not None:
        tokens = _tokens_of_text(arguments.text, arguments.encoding, tokenizer)
    else:
        tokens = _validation_tokens(arguments.checkpoints, arguments.data, tokenizer)
    protocols = PROTOCOLS if arguments.protocol == "all" else (arguments.protocol,)
    batch_size = read_description(find_checkpoint(arguments.checkpoints[0]))["summary"]["batch_size"]
    losses = evaluate(model, tokens, EvaluationConfig(), batch_size, device, protocols)
    if arguments.json:
        print(json.dumps(losses, indent=1))
    else:
        print("\n".join(f"{protocol:<8} {loss:.4f} nats per token" for protocol, loss in losses.items()))


def info_command(arguments: argparse.Namespace) -> None:
    from chargpt.info import as_text, collect

    info = collect()
    print(json.dumps(info, indent=1) if arguments.json else as_text(info))


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


@contextlib.contextmanager
def _machine(run: "Run", device: "torch.device") -> "Iterator[Machine]":
    """This machine, as `fit` asks about it. A run that goes on gets the answers it got when it began."""
    from chargpt.files import replaced_file
    from chargpt.planner import Machine, Speed
    from chargpt.runtime import available_memory
    from chargpt.training import measure_speed

    path = run.folder / "machine.json"
    goes_on = os.path.lexists(run.folder / "last")
    known: dict[str, Any] = {"memory": available_memory(device), "speeds": []}
    if goes_on:
        with contextlib.suppress(OSError, ValueError):  # a run that was not fitted, or by hand: measured again
            known = json.loads(path.read_text(encoding="utf-8"))

    def speed(config: "TrainConfig") -> Speed:
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


def _tokens_of_text(path: str, encoding: str, tokenizer: "Tokenizer") -> "Tokens":
    from chargpt.text import read_text

    tokens = tokenizer.encode(read_text(path, encoding))
    if len(tokens) < 2:
        raise CorpusError(f"{path} has {len(tokens)} token; at least two are needed to score one")
    return tokens


def _validation_tokens(checkpoints: list[Path], given: Path | None, tokenizer: "Tokenizer") -> "Tokens":
    """The validation part that belongs to all checkpoints, or the one in the folder that was given.

    Raises CorpusError when there is none, TokenizerError when it is another tokenizer's, and CheckpointError when a
    model was trained on other data than lie beside the first.
    """
    from chargpt.checkpoint import require_same_data
    from chargpt.data import load_splits

    checkpoint, data = checkpoints[0], given
    if data is None:
        candidates = (checkpoint / "data", checkpoint.resolve().parent / "data", Path("data/splits"))
        data = next((folder for folder in candidates if (folder / "val.npy").exists()), None)
    if data is None:
        raise CorpusError(f"{checkpoint} has no data beside it; name a folder with --data, or a text with --text")
    splits = load_splits(data)
    if splits.tokenizer.fingerprint != tokenizer.fingerprint:
        raise TokenizerError(
            f"{checkpoint} was trained with another tokenizer ({tokenizer.vocab_size} symbols) than made {data} "
            f"({splits.tokenizer.vocab_size} symbols); use its own data, or score a text with --text"
        )
    if given is None:
        for path in checkpoints:
            require_same_data(path, splits.fingerprint)
    return splits.val_with_context
