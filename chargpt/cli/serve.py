"""`chargpt serve`: models behind HTTP, with a page and for any OpenAI client."""

import argparse
import os
from pathlib import Path
from typing import get_args

from chargpt.cli.parsing import DEVICES, Commands, command
from chargpt.config import Engine
from chargpt.errors import ConfigError

EXAMPLES = """examples:
  chargpt serve runs/my
  chargpt serve runs/my runs/other three=runs/a,runs/b,runs/c --port 8080
  CHARGPT_API_KEY=… chargpt serve runs/my --host 0.0.0.0 --allow-host gpt.example.org
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{"model": "my", "prompt": "ROMEO:", "max_tokens": 200, "stream": true}'"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add(commands: Commands) -> None:
    serve = command(commands, "serve", run, EXAMPLES, "Serve models to a browser and to OpenAI clients.")
    serve.add_argument(
        "models",
        metavar="[NAME=]RUN[,RUN]",
        nargs="+",
        help="runs or checkpoints, by their folders' names or NAME; several with commas predict together",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    serve.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name under which clients may reach it; may be given several times (default: this machine's loopback)",
    )
    serve.add_argument(
        "--api-key",
        help="what clients have to send, needed for any other --host (default: that of CHARGPT_API_KEY)",
    )
    serve.add_argument("--slots", type=int, default=32, help="streams at a time for each model (default: %(default)s)")
    serve.add_argument(
        "--engine",
        choices=get_args(Engine),
        default="auto",
        help="torch, or C++ in fp32, bf16 or int8 (default: %(default)s, C++ in int8 where it can, else torch)",
    )
    serve.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    api_key = os.environ.get("CHARGPT_API_KEY") if arguments.api_key is None else arguments.api_key
    if api_key == "":
        raise ConfigError("the API key is empty: give one with CHARGPT_API_KEY or --api-key, or neither of them")
    if arguments.host not in LOOPBACK and not (api_key and arguments.allow_host):
        raise ConfigError(
            f"--host {arguments.host} is open to others: name with --allow-host what they call this server, and ask "
            f"for a key with CHARGPT_API_KEY or --api-key"
        )
    if not 0 <= arguments.port < 2**16:
        raise ConfigError(f"--port {arguments.port} is no port; take one from 1 to 65535, or 0 for any")
    if not 1 <= arguments.slots <= 1024:
        raise ConfigError(f"--slots must be from 1 to 1024, got {arguments.slots}")
    named = dict(map(split, arguments.models))
    if len(named) < len(arguments.models):
        raise ConfigError("two models have the same name; give them others, as in other=runs/my")
    try:
        from chargpt.serve.app import LOOPBACK as ANSWERED
        from chargpt.serve.app import build_app
        from chargpt.serve.engine import ModelEngine
        from chargpt.serve.listen import bind, listen
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'chargpt[serve]'") from None
    from chargpt.checkpoint import load_ensemble
    from chargpt.runtime import resolve_device

    listener = bind(arguments.host, arguments.port)  # what cannot be had is said before anything is loaded
    device = resolve_device(arguments.device)
    engines = {}
    for name, paths in named.items():
        model, tokenizer = load_ensemble(paths, device)
        engines[name] = ModelEngine(model, tokenizer, device, arguments.engine, arguments.slots)
        engine, why = engines[name].chosen
        print(f"{name}: {engine if engine == 'torch' else f'C++ in {engine}'} ({why})", flush=True)
    app = build_app(engines, api_key=api_key, hosts=[*ANSWERED, *arguments.allow_host])

    def close() -> None:
        for engine in engines.values():
            engine.close()

    try:
        listen(app, listener, close)
    finally:
        close()
        listener.close()


def split(given: str) -> tuple[str, list[Path]]:
    """The name and the runs of a model."""
    name, equals, rest = given.partition("=")
    paths = [Path(path) for path in (rest if equals else given).split(",")]
    name = name if equals else "+".join(path.resolve().name for path in paths)
    if not name or "" in (rest if equals else given).split(","):
        raise ConfigError(f"{given!r} names no model; it is RUN, NAME=RUN or NAME=RUN,RUN")
    return name, paths
