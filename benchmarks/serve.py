"""`chargpt serve` under load: characters a second, the first one, clients that go away, many of them, and memory.

Run as `python -m benchmarks.serve [RUN] [--soak SECONDS]`. Without RUN the model is `modern` with random weights, which
changes no work. The server is a process of its own, and so shares the cores with these clients.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx2

from chargpt.checkpoint import save_checkpoint
from chargpt.config import load_params
from chargpt.models import build_model
from chargpt.tokenizers import CharacterTokenizer

SYMBOLS = "".join(map(chr, range(48, 113)))  # 65 of them
STREAMS, LONG = 32, 4_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", nargs="?", type=Path, help="a trained model (default: random weights)")
    parser.add_argument(
        "--soak", type=float, default=30, help="seconds under load for the memory (default: %(default)s)"
    )
    parser.add_argument("--connections", type=int, default=1000, help="at once (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run
        if run is None:
            run, tokenizer = Path(folder) / "modern", CharacterTokenizer(SYMBOLS)
            save_checkpoint(
                run, build_model(load_params().variants["modern"].model, 65, seed=1), tokenizer, {"step": 0}
            )
        start = time.perf_counter()
        program = "import sys; from chargpt.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "serve", f"m={run}", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            lines = [server.stdout.readline() for _ in range(2)]
            print(f"ready after {time.perf_counter() - start:.1f} s; {lines[0].strip()}", flush=True)
            try:
                asyncio.run(measure(lines[1].split()[2].rstrip(","), server.pid, options.soak, options.connections))
            finally:
                server.terminate()


async def measure(url: str, pid: int, soak: float, connections: int) -> None:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=STREAMS)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(characters(client, i, 50) for i in range(STREAMS)))  # warm
        firsts = [await first_character(client, i) for i in range(30)]
        print(f"first character on an idle server: median {1e3 * statistics.median(firsts):.1f} ms", flush=True)
        freed = [await seconds_to_free(client, i) for i in range(30)]
        print(
            f"a place is free again: median {1e3 * statistics.median(freed):.0f} ms after its client went, "
            f"at most {1e3 * max(freed):.0f}",
            flush=True,
        )
        start = time.perf_counter()
        made = sum(await asyncio.gather(*(characters(client, i, LONG) for i in range(STREAMS))))
        print(f"{STREAMS} streams: {made / (time.perf_counter() - start):,.0f} characters a second", flush=True)
        start = time.perf_counter()
        found = await asyncio.gather(*(attempt(client, i) for i in range(connections)))
        wrong = [status for status in found if status not in (200, 429)]
        print(
            f"{connections:,} connections at once: {found.count(200):,} served, {found.count(429):,} told to "
            f"come back, {len(wrong)} lost, in {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        memory, sizes, end, round_ = Path(f"/proc/{pid}/statm"), [], time.perf_counter() + soak, 0
        while time.perf_counter() < end:
            await asyncio.gather(*(characters(client, 100 * round_ + i, 500) for i in range(STREAMS)))
            sizes.append(int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
            round_ += 1
        if len(sizes) > 2:
            grown = sizes[-1] - sizes[len(sizes) // 2]
            print(f"{soak:.0f} s of load: {sizes[-1]:,.0f} MiB, {grown:+.1f} MiB over its second half")


def request(seed: int, count: int, **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "O", "max_tokens": count, "seed": seed, **more}


async def pieces(client: httpx2.AsyncClient, seed: int, count: int) -> AsyncGenerator[str, None]:
    async with client.stream("POST", "/v1/completions", json=request(seed, count, stream=True)) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])["choices"][0]["text"]


async def characters(client: httpx2.AsyncClient, seed: int, count: int) -> int:
    made = 0
    async for piece in pieces(client, seed, count):
        made += len(piece)
    assert made == count
    return made


async def first_character(client: httpx2.AsyncClient, seed: int) -> float:
    start = time.perf_counter()
    async for _ in pieces(client, seed, 1):
        return time.perf_counter() - start
    raise AssertionError("nothing came")


async def seconds_to_free(client: httpx2.AsyncClient, seed: int) -> float:
    """From the end of a client in the middle of its text until the server says that nothing runs; asking takes part."""
    async with contextlib.aclosing(pieces(client, seed, 100_000)) as stream:
        await anext(stream)
        start = time.perf_counter()
    while 'vllm:num_requests_running{model_name="m"} 0.0' not in (await client.get("/metrics")).text:
        pass
    return time.perf_counter() - start


async def attempt(client: httpx2.AsyncClient, seed: int) -> int:
    """The status of a request whose answer has to be that of its own seed alone."""
    answer = await client.post("/v1/completions", json=request(seed % 10, 20))
    if answer.status_code == 200:
        text = answer.json()["choices"][0]["text"]
        assert TEXTS.setdefault(seed % 10, text) == text
    return answer.status_code


TEXTS: dict[int, str] = {}  # of each seed

if __name__ == "__main__":
    main()
