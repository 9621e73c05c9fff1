"""The command line for people without DVC: train on any text, sample, evaluate, and see what this machine offers."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chargpt import __version__
from chargpt.errors import ConfigError, CorpusError, TokenizerError, user_errors

if TYPE_CHECKING:
    from chargpt.data import Tokens
    from chargpt.tokenizers import Tokenizer

EXAMPLES = {
    "train": """examples:
  chargpt train my.txt                          nanoGPT's CPU configuration; the run goes to runs/my
  chargpt train my.txt --set max_steps=500      the same command goes on after Ctrl-C
  chargpt train poems/ --set model.n_layer=6 --set model.dropout=0.1 --out runs/poems-6
  chargpt train my.txt --set model.kind=bigram
  chargpt train my.txt --set max_steps=null --set max_seconds=300""",
    "sample": """examples:
  chargpt sample runs/my --prompt "ROMEO:" --stream
  chargpt sample models/nanogpt-cpu-s1 --num-samples 3 --temperature 1.0 --top-p 0.95""",
    "eval": """examples:
  chargpt eval runs/my
  chargpt eval models/bigram-s1 --data data/splits --protocol full
  chargpt eval runs/my --text other.txt""",
    "info": """examples:
  chargpt info
  chargpt info --json""",
}


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
    train.add_argument("--config", type=Path, help="YAML with the fields of one variant of params.yaml")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one knob, as in model.n_layer=6; repeat"
    )
    train.add_argument("--seed", type=int, default=1, help="of weights, batches and dropout (default: 1)")
    train.add_argument("--val-fraction", type=float, default=0.1, help="last part of the text to validate on")
    train.add_argument("--encoding", default="utf-8", help="of the text (default: utf-8)")
    train.add_argument("--track", action="store_true", help="log the run to MLflow (needs chargpt[pipeline])")

    sample = command("sample", sample_command, "Generate text from a run or a checkpoint.")
    sample.add_argument("checkpoint", type=Path, help="the folder of a run (its best checkpoint) or of a checkpoint")
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

    evaluate = command("eval", eval_command, "Loss of a run or a checkpoint, in nats per token.")
    evaluate.add_argument("checkpoint", type=Path, help="the folder of a run (its best checkpoint) or of a checkpoint")
    source = evaluate.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help="a folder with val.npy (default: the run's own, else data/splits)")
    source.add_argument("--text", help="score this text instead, every token after its first")
    evaluate.add_argument(
        "--protocol", choices=("full", "sliding", "nanogpt", "all"), default="all", help="how to score (default: all)"
    )
    evaluate.add_argument("--encoding", default="utf-8", help="of --text")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    info = command("info", info_command, "Versions, devices, and which kernels exist here and why the others do not.")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


# ------------------------------------------------------------------------------------------------------------ commands


def train_command(arguments: argparse.Namespace) -> None:
    from chargpt.config import (
        EvaluationConfig,
        SplitConfig,
        TokenizerConfig,
        TrackingConfig,
        TrainConfig,
        load_train_config,
        override,
    )
    from chargpt.corpus import read_text
    from chargpt.data import split_tokens
    from chargpt.tokenizers import build_tokenizer
    from chargpt.training import Run, train

    config = override(load_train_config(arguments.config) if arguments.config else TrainConfig(), arguments.set)
    text = read_text(arguments.text, arguments.encoding)
    tokenizer = build_tokenizer(TokenizerConfig(), text)
    splits = split_tokens(tokenizer.encode(text), tokenizer, SplitConfig(arguments.val_fraction).val_fraction)
    name = Path(arguments.text).resolve().stem
    run = Run(config.model.kind, arguments.seed, config, splits, name, arguments.out or Path("runs") / name)
    metrics = train(run, EvaluationConfig(), TrackingConfig(enabled=arguments.track))
    print(f"validation loss {metrics['val_full']:.4f} nats per token at step {metrics['best_step']}, in {run.folder}")
    print(f"sample it: chargpt sample {run.folder} --stream")


def sample_command(arguments: argparse.Namespace) -> None:
    from chargpt.checkpoint import load_model
    from chargpt.config import SampleConfig
    from chargpt.runtime import resolve_device
    from chargpt.sampling import generate_text, stream_text

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
    model, tokenizer = load_model(arguments.checkpoint, device)
    if arguments.stream:
        pieces = stream_text(model, tokenizer, arguments.prompt, config, device)
        print(arguments.prompt, end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
        return
    print("\n---\n".join(generate_text(model, tokenizer, arguments.prompt, config, device)))


def eval_command(arguments: argparse.Namespace) -> None:
    from chargpt.checkpoint import find_checkpoint, load_model, read_description
    from chargpt.config import EvaluationConfig
    from chargpt.evaluation import PROTOCOLS, evaluate
    from chargpt.runtime import resolve_device

    device = resolve_device(arguments.device)
    folder = find_checkpoint(arguments.checkpoint)
    model, tokenizer = load_model(folder, device)
    if arguments.text is not None:
        tokens = _tokens_of_text(arguments.text, arguments.encoding, tokenizer)
    else:
        tokens = _validation_tokens(arguments.checkpoint, arguments.data, tokenizer)
    protocols = PROTOCOLS if arguments.protocol == "all" else (arguments.protocol,)
    batch_size = read_description(folder)["summary"]["batch_size"]
    losses = evaluate(model, tokens, EvaluationConfig(), batch_size, device, protocols)
    if arguments.json:
        print(json.dumps(losses, indent=1))
    else:
        print("\n".join(f"{protocol:<8} {loss:.4f} nats per token" for protocol, loss in losses.items()))


def info_command(arguments: argparse.Namespace) -> None:
    from chargpt.info import as_text, collect

    info = collect()
    print(json.dumps(info, indent=1) if arguments.json else as_text(info))


def _tokens_of_text(path: str, encoding: str, tokenizer: "Tokenizer") -> "Tokens":
    from chargpt.corpus import read_text

    tokens = tokenizer.encode(read_text(path, encoding))
    if len(tokens) < 2:
        raise CorpusError(f"{path} has {len(tokens)} token; at least two are needed to score one")
    return tokens


def _validation_tokens(checkpoint: Path, data: Path | None, tokenizer: "Tokenizer") -> "Tokens":
    """The validation part that belongs to a checkpoint. Raises when there is none, or it is another tokenizer's."""
    from chargpt.data import load_splits

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
    return splits.val_with_context
