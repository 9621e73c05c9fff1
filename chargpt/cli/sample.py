"""`chargpt sample`: text from a model."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from chargpt.cli.parsing import CHECKPOINTS, DEVICES, Commands, command
from chargpt.config import Engine, SampleConfig
from chargpt.errors import ConfigError

if TYPE_CHECKING:
    from chargpt.generation import Completion, Generator, Piece

EXAMPLES = """examples:
  chargpt sample runs/my --prompt "ROMEO:" --stream
  chargpt sample runs/my --prompt-file scene.txt --stop "JULIET:" --max-new-tokens 2000
  chargpt sample runs/my --interactive --temperature 0.9
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
    shown = sample.add_mutually_exclusive_group()
    shown.add_argument(
        "--stream", action="store_true", help="print tokens as they come; several samples side by side (default: no)"
    )
    shown.add_argument(
        "--interactive",
        action="store_true",
        help="ask for a prompt, show several answers, go on with the chosen one (default: no)",
    )
    shown.add_argument(
        "--logprobs",
        action="store_true",
        help="print each token with the logarithm of its probability, by the model alone (default: no)",
    )
    sample.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object a line: each sample, or with --stream each piece of one (default: no)",
    )
    sample.add_argument(
        "--num-samples",
        type=int,
        help=f"samples (default: {usual.num_samples}; with --interactive as many as fit, up to 3)",
    )
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
    sample.add_argument("--allow", metavar="CHARACTERS", help="tokens with any other cannot come (default: all may)")
    sample.add_argument(
        "--ban", metavar="CHARACTERS", default=usual.ban, help="tokens with one of these cannot come (default: none)"
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
        help="torch, or C++ in fp32, bf16 or int8 (default: %(default)s, C++ in int8 where it can, else torch)",
    )
    sample.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from chargpt.checkpoint import load_ensemble
    from chargpt.generation import Generator
    from chargpt.runtime import resolve_device

    several = arguments.num_samples
    config = SampleConfig(
        num_samples=1 if several is None else several,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        stop=tuple(arguments.stop),
        allow=arguments.allow,
        ban=arguments.ban,
        keep=arguments.keep,
        unknown=arguments.unknown,
        engine=arguments.engine,
        seed=arguments.seed,
    )
    on_terminal = sys.stdout.isatty()
    if arguments.stream and config.num_samples != 1 and not (on_terminal or arguments.json):
        raise ConfigError("--stream shows several samples on a terminal only; leave out --stream, or add --json")
    if arguments.interactive and (arguments.json or not (on_terminal and sys.stdin.isatty())):
        raise ConfigError("--interactive needs a terminal to ask and to answer; leave it out, or --json")
    device = resolve_device(arguments.device)
    model, tokenizer = load_ensemble(arguments.checkpoints, device)
    prompt = arguments.prompt if arguments.prompt_file is None else read_prompt(arguments.prompt_file)
    generator = Generator(model, tokenizer, device)
    if arguments.interactive:
        from chargpt.cli.interactive import converse

        converse(generator, prompt, config, several)
    elif arguments.stream:
        stream(generator, prompt, config, as_json=arguments.json)
    elif arguments.json:
        for i, whole in enumerate(generator.generate(prompt, config)):
            print_json({"sample": i, "prompt": prompt, **described(whole), "finish_reason": whole.finish_reason})
    elif arguments.logprobs:
        samples = generator.generate(prompt, config)
        print("\n---\n".join(table(generator, whole) for whole in samples))
    else:
        print("\n---\n".join(prompt + whole.text for whole in generator.generate(prompt, config)))


def stream(generator: "Generator", prompt: str, config: SampleConfig, *, as_json: bool) -> None:
    """Show the samples while they come, and at the end, on a terminal, how fast they came."""
    steps = generator.stream(prompt, config)
    start, tokens = time.perf_counter(), 0
    if config.num_samples > 1 and not as_json:
        from chargpt.cli.columns import Columns, printable

        columns = Columns(config.num_samples)
        if prompt:
            columns.console.print(printable(prompt))
        columns.show(steps)
        tokens = columns.tokens
    else:
        if not as_json:
            print(prompt, end="", flush=True)
        for i, piece in pieces(steps):
            if as_json:
                print_json({"sample": i, **described(piece), "finish_reason": piece.finish_reason})
            else:
                print(piece.text, end="", flush=True)
            tokens += len(piece.tokens)
        if not as_json:
            print()
    if sys.stderr.isatty() and tokens:
        from chargpt.generation import choose_engine

        seconds = time.perf_counter() - start
        engine, why = choose_engine(generator.model, config.engine)
        by = f"{engine if engine == 'torch' else f'C++ in {engine}'} ({why})"
        print(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} a second, by {by}", file=sys.stderr)


def pieces(steps: "Iterator[list[Piece]]") -> "Iterator[tuple[int, Piece]]":
    """Those that have tokens, with the numbers of their samples."""
    for step in steps:
        yield from ((i, piece) for i, piece in enumerate(step) if piece.tokens)


def described(part: "Piece | Completion") -> dict[str, object]:
    return {"text": part.text, "tokens": part.tokens, "logprobs": [round(logprob, 6) for logprob in part.logprobs]}


def print_json(content: dict[str, object]) -> None:
    print(json.dumps(content), flush=True)


def table(generator: "Generator", whole: "Completion") -> str:
    """A line for each token: ln p, and its text."""
    texts = (generator.tokenizer.decode([token]) for token in whole.tokens)
    return "\n".join(f"{logprob:9.4f}  {text!r}" for logprob, text in zip(whole.logprobs, texts, strict=True))


def read_prompt(path: str) -> str:
    """The text of a file, or of standard input for "-", as it is. Raises ConfigError when it cannot be read."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--prompt-file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file {path} is not UTF-8 at byte {error.start}; convert it first") from None
