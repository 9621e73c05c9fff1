"""`chargpt eval`: the loss of a model on a text."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from chargpt.cli.parsing import CHECKPOINTS, DEVICES, Commands, command
from chargpt.errors import CorpusError, TokenizerError

if TYPE_CHECKING:
    from chargpt.data import Tokens
    from chargpt.tokenizers import Tokenizer

EXAMPLES = """examples:
  chargpt eval runs/my
  chargpt eval models/bigram-s1 --data data/splits --protocol full
  chargpt eval runs/my --text other.txt
  chargpt eval runs/my --protocol dynamic
  chargpt eval models/modern-s1 models/modern-s2 models/modern-s3    the three together"""


def add(commands: Commands) -> None:
    evaluate = command(
        commands, "eval", run, EXAMPLES, "Loss of a run or a checkpoint, or of several together, in nats per token."
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
    evaluate.add_argument("--encoding", default="utf-8", help="of --text (default: %(default)s)")
    evaluate.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
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
