"""`chargpt eval`: the loss of a model on a text."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chargpt.cli.parsing import CHECKPOINTS, DEVICES, Commands, command
from chargpt.errors import CorpusError, TokenizerError

if TYPE_CHECKING:
    import numpy.typing as npt

    from chargpt.data import Splits
    from chargpt.tokenizers import Tokenizer

EXAMPLES = """examples:
  chargpt eval runs/my
  chargpt eval models/bigram-s1 --data data/splits --protocol full
  chargpt eval runs/my --text other.txt
  chargpt eval runs/my --protocol dynamic
  chargpt eval models/modern-s1 models/modern-s2 models/modern-s3    the three together"""


def add(commands: Commands) -> None:
    evaluate = command(
        commands,
        "eval",
        run,
        EXAMPLES,
        "Loss of a run, or of several together, in nats per token and bits per byte.",
    )
    evaluate.add_argument("checkpoints", metavar="checkpoint", type=Path, nargs="+", help=CHECKPOINTS)
    source = evaluate.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        type=Path,
        help="the data to validate on: a folder of it, or the text that the first run was trained on, if its data was "
        "deleted (default: found by its hash, in data/ beside the run or above it)",
    )
    source.add_argument("--text", help="score this text instead, every token after its first")
    evaluate.add_argument(
        "--protocol",
        choices=("full", "sliding", "nanogpt", "all", "dynamic"),
        default="all",
        help="how to score (default: all of the first three); dynamic learns from each window after scoring it",
    )
    evaluate.add_argument("--encoding", default="utf-8", help="of the text (default: %(default)s)")
    evaluate.add_argument(
        "--unknown",
        choices=("strict", "replace", "skip"),
        default="strict",
        help="what to do with characters of --text that the model does not know (default: %(default)s, an error)",
    )
    evaluate.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    from chargpt.checkpoint import load_ensemble, read_description
    from chargpt.config import EvaluationConfig
    from chargpt.console import say
    from chargpt.data import byte_count
    from chargpt.evaluation import PROTOCOLS, bits_per_byte, evaluate
    from chargpt.runtime import resolve_device

    device = resolve_device(arguments.device)
    model, tokenizer = load_ensemble(arguments.checkpoints, device)
    if arguments.text is not None:
        tokens = _tokens_of_text(arguments.text, arguments.encoding, arguments.unknown, tokenizer)
    else:
        tokens = _validation_tokens(arguments.checkpoints, arguments.data, arguments.encoding, tokenizer)
    protocols = PROTOCOLS if arguments.protocol == "all" else (arguments.protocol,)
    batch_size = read_description(arguments.checkpoints[0])["summary"]["batch_size"]
    losses: dict[str, float] = {}
    for protocol in protocols:
        try:
            losses |= evaluate(model, tokens, EvaluationConfig(), batch_size, device, (protocol,))
        except CorpusError as error:
            if arguments.protocol != "all" or protocol == "full":
                raise
            say(f"not by {protocol}: {error}")  # what the others say is not lost
    bytes_per_token = byte_count(tokens[1:], tokenizer) / (len(tokens) - 1)
    bits = {protocol: bits_per_byte(loss, bytes_per_token) for protocol, loss in losses.items()}
    if arguments.json:
        print(json.dumps(losses | {"bits_per_byte": bits}, indent=1))
    else:
        for protocol, loss in losses.items():
            print(f"{protocol:<8} {loss:.4f} nats per token, {bits[protocol]:.4f} bits per byte")


def _tokens_of_text(path: str, encoding: str, unknown: Any, tokenizer: "Tokenizer") -> "npt.NDArray[Any]":
    from chargpt.text import read_text

    tokens = tokenizer.encode(read_text(path, encoding), errors=unknown)
    if len(tokens) < 2:
        raise CorpusError(f"{path} has {len(tokens)} token; at least two are needed to score one")
    return tokens


def _validation_tokens(
    checkpoints: list[Path], given: Path | None, encoding: str, tokenizer: "Tokenizer"
) -> "npt.NDArray[Any]":
    """The validation part that all checkpoints were chosen by, or the one in the folder or the text that was given.

    Raises CorpusError when there is none, TokenizerError when it is another tokenizer's, and CheckpointError when a
    model was trained on other data than the first.
    """
    from chargpt.checkpoint import read_description, require_same_data
    from chargpt.data import MANIFEST, find_splits, load_splits

    first = checkpoints[0]
    summary = read_description(first)["summary"]
    if given is not None and given.is_dir() and (given / MANIFEST).exists():
        splits = load_splits(given)
        if splits.tokenizer.fingerprint != tokenizer.fingerprint:
            raise TokenizerError(
                f"{first} was trained with another tokenizer ({tokenizer.vocab_size} symbols) than made {given} "
                f"({splits.tokenizer.vocab_size} symbols); use its own data, or score a text with --text"
            )
        return splits.val_with_context
    if given is not None:
        splits = _the_same_text(given, encoding, summary, tokenizer)
    else:
        folder = find_splits(first, summary["data"]) or find_splits(Path(), summary["data"])
        if folder is None:
            raise CorpusError(
                f"the data of {first} is not there: {summary['data']} was looked for in data/ beside it and above it. "
                f"Name the text that it was trained on with --data, or another text with --text"
            )
        splits = load_splits(folder)
    for path in checkpoints:
        require_same_data(path, splits.fingerprint)
    return splits.val_with_context


def _the_same_text(path: Path, encoding: str, summary: dict[str, Any], tokenizer: "Tokenizer") -> "Splits":
    """The data that a run names, made again from its text. Raises CorpusError when that is another text."""
    from chargpt.data import split_at
    from chargpt.text import read_text

    ids = tokenizer.encode(read_text(str(path), encoding), errors="replace")
    if len(ids) > summary["train_tokens"]:
        splits = split_at(ids, tokenizer, summary["train_tokens"])
        if splits.fingerprint == summary["data"]:
            return splits
    raise CorpusError(f"{path} is not the text that the run was trained on; to score another text, use --text {path}")
