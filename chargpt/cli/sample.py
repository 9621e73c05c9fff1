"""`chargpt sample`: text from a model."""

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from chargpt.cli.parsing import CHECKPOINTS, DEVICES, Commands, command
from chargpt.config import Engine, SampleConfig
from chargpt.errors import ConfigError

EXAMPLES = """examples:
  chargpt sample runs/my --prompt "ROMEO:" --stream
  chargpt sample runs/my --prompt-file scene.txt --stop "JULIET:" --max-new-tokens 2000
  chargpt sample models/nanogpt-cpu-s1 --num-samples 3 --temperature 1.0 --top-p 0.95"""


def add(commands: Commands) -> None:
    usual = SampleConfig()
    sample = command(commands, "sample", run, EXAMPLES, "Generate text from a run or a checkpoint.")
    sample.add_argument("checkpoints", metavar="checkpoint", type=Path, nargs="+", help=CHECKPOINTS)
    prompt = sample.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to go on from (default: none)")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="the same from a file in UTF-8; - for standard input (default: none)"
    )
    sample.add_argument("--stream", action="store_true", help="print each token as it comes")
    sample.add_argument("--num-samples", type=int, default=usual.num_samples, help="samples (default: %(default)s)")
    sample.add_argument(
        "--max-new-tokens", type=int, default=usual.max_new_tokens, help="length of each (default: %(default)s)"
    )
    sample.add_argument(
        "--temperature",
        type=float,
        default=usual.temperature,
        help="0 takes the likeliest token (default: %(default)s)",
    )
    sample.add_argument("--top-k", type=int, help="keep the k likeliest tokens (default: all)")
    sample.add_argument(
        "--top-p", type=float, help="keep the likeliest tokens that together have this probability (default: all)"
    )
    sample.add_argument(
        "--min-p", type=float, help="drop tokens below this share of the likeliest one's probability (default: none)"
    )
    sample.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end at this text, which is not shown; may be given several times (default: none)",
    )
    sample.add_argument(
        "--keep", type=int, help="tokens of a full window that the model goes on with (default: half of them)"
    )
    sample.add_argument("--seed", type=int, default=usual.seed, help="of the random choices (default: %(default)s)")
    sample.add_argument(
        "--unknown",
        choices=("strict", "replace", "skip"),
        default=usual.unknown,
        help="what to do with characters of the prompt that the model does not know (default: %(default)s, an error)",
    )
    sample.add_argument(
        "--engine",
        choices=get_args(Engine),
        default=usual.engine,
        help="torch, or C++ with weights in fp32 or bf16 (default: %(default)s, C++ in bf16 where it can, else torch)",
    )
    sample.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from chargpt.checkpoint import load_ensemble
    from chargpt.generation import choose_engine, generate_text, stream_text
    from chargpt.runtime import resolve_device

    config = SampleConfig(
        num_samples=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        stop=tuple(arguments.stop),
        keep=arguments.keep,
        unknown=arguments.unknown,
        engine=arguments.engine,
        seed=arguments.seed,
    )
    if arguments.stream and config.num_samples != 1:
        raise ConfigError("--stream shows one sample; leave out --stream or --num-samples")
    device = resolve_device(arguments.device)
    model, tokenizer = load_ensemble(arguments.checkpoints, device)
    prompt = arguments.prompt if arguments.prompt_file is None else read_prompt(arguments.prompt_file)
    if not arguments.stream:
        print("\n---\n".join(generate_text(model, tokenizer, prompt, config, device)))
        return
    pieces = stream_text(model, tokenizer, prompt, config, device)
    print(prompt, end="", flush=True)
    start, tokens = time.perf_counter(), 0
    for (piece,) in pieces:
        print(piece, end="", flush=True)
        tokens += 1
    print()
    tokens = min(tokens, config.max_new_tokens)  # what was held back for a stop text comes as one piece more
    if sys.stderr.isatty() and tokens:
        seconds = time.perf_counter() - start
        engine = choose_engine(model, config.engine)
        by = "torch" if engine == "torch" else f"C++ in {engine}"
        print(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} a second, by {by}", file=sys.stderr)


def read_prompt(path: str) -> str:
    """The text of a file, or of standard input for "-", as it is. Raises ConfigError when it cannot be read."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--prompt-file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file {path} is not UTF-8 at byte {error.start}; convert it first") from None
