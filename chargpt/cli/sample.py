"""`chargpt sample`: text from a model."""

import argparse
from pathlib import Path

from chargpt.cli.parsing import CHECKPOINTS, Commands, command
from chargpt.errors import ConfigError

EXAMPLES = """examples:
  chargpt sample runs/my --prompt "ROMEO:" --stream
  chargpt sample models/nanogpt-cpu-s1 --num-samples 3 --temperature 1.0 --top-p 0.95"""


def add(commands: Commands) -> None:
    sample = command(commands, "sample", run, EXAMPLES, "Generate text from a run or a checkpoint.")
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


def run(arguments: argparse.Namespace) -> None:
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
