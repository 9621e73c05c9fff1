"""What is fuzzed. A target is made in an empty folder; `once(rng)` tries one piece of input.

It returns what became of it ("taken", "refused"), and raises for anything else: whatever is no error for users, a
result that is not the reference's, a file of the user's that changed.
"""

import asyncio
import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

import runs
from chargpt import cli
from chargpt.checkpoint import load_model, load_state
from chargpt.config import (
    SampleConfig,
    TokenizerConfig,
    TrainConfig,
    TransformerConfig,
    load_params,
    load_train_config,
    override,
)
from chargpt.data import load_splits, require_size, split_tokens, write_splits
from chargpt.errors import ChargptError
from chargpt.generation import NativeDecoder
from chargpt.generation.native import Precision
from chargpt.models import build_model
from chargpt.serve.app import build_app
from chargpt.serve.engine import ModelEngine
from chargpt.text import read_text
from chargpt.tokenizers import build_tokenizer, load_tokenizer
from checkpoint.test_checkpoint import reseal
from checkpoint.test_folder import everything
from kernels.test_odd_tensors import KINDS, OPERATIONS, value

TAKEN, REFUSED = "taken", "refused"
NASTY: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        2**31,
        2**63,
        10**30,
        0.0,
        0.5,
        -1.5,
        1e-300,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *(
        "",
        "x",
        "auto",
        "transformer",
        "bigram",
        "../x",
        "/",
        "~",
        "\0",
        "\ud800",
        "é",
        "x" * 5000,
        "1e3",
        "017",
        "1:30",
    ),
    *([], {}, [[]], {"a": 1}, [1, 2], ["x"], {"kind": "bigram"}, {"kind": "transformer", "n_layer": 1}),
]


def attempt(action: Callable[[], Any]) -> str:
    try:
        action()
    except ChargptError as error:
        if len(str(error)) > 20_000:
            raise AssertionError(f"a message of {len(str(error)):,} characters") from error
        return REFUSED
    return TAKEN


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut off, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 2:
                del changed[at : at + rng.randrange(1, 50)]
            case 3:
                changed[at:at] = changed[at : at + rng.randrange(1, 50)]
            case _:
                del changed[at:]
    return bytes(changed)


def changed_value(rng: random.Random, content: Any) -> Any:
    """Plain data with one part of it, at any depth, replaced, left out or named otherwise."""
    if isinstance(content, dict) and content and rng.random() < 0.85:
        key = rng.choice(sorted(content, key=str))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in content.items() if k != key}
            case 1:
                return content | {rng.choice(["", "x", str(key) + "s", "__class__"]): rng.choice(NASTY)}
            case _:
                return content | {key: changed_value(rng, content[key])}
    if isinstance(content, list) and content and rng.random() < 0.7:
        at = rng.randrange(len(content))
        return [*content[:at], changed_value(rng, content[at]), *content[at + 1 :]]
    return rng.choice(NASTY)


class Checkpoints:
    """A run's checkpoint whose bytes, fields or tensors were changed, sealed again or not: loaded, and gone on with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = override(
            runs.CASES["transformer-muon-random-ema"], ["max_steps=4", "eval_interval=2", "log_interval=3"]
        )
        runs.train(folder / "whole", self.config)
        (folder / "whole" / "metrics.json").unlink()

    def once(self, rng: random.Random) -> str:
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.folder / "whole", run, symlinks=True)
        last = run / "last"
        match rng.randrange(4):
            case 0:
                path = last / rng.choice(sorted(os.listdir(last)))
                path.write_bytes(changed_bytes(rng, path.read_bytes()))
                if rng.random() < 0.5 and path.name != "checkpoint.json":
                    reseal(last)
            case 1:
                try:
                    reseal(last, lambda content: _replace(content, changed_value(rng, content)))
                except UnicodeEncodeError:  # half a character: no such file can be sealed
                    return REFUSED
            case 2:
                path = last / rng.choice(["state.safetensors", "model.safetensors"])
                tensors = load_file(path)
                name = rng.choice(sorted(tensors))
                shape = [rng.choice([0, 1, 2, 3, 8, 24]) for _ in range(rng.randrange(4))]
                dtype = rng.choice([torch.float32, torch.float16, torch.int64, torch.int8, torch.bool, torch.uint8])
                tensors[name] = torch.randint(0, 2, shape).to(dtype)
                save_file(tensors, path)
                reseal(last)
            case _:
                path = run / rng.choice(["run.json", "config.yaml", "curve.csv", "timing.csv", "sample.txt"])
                if path.exists():
                    path.write_bytes(changed_bytes(rng, path.read_bytes()))
        outcomes = [
            attempt(lambda: load_model(run)),
            attempt(lambda: load_state(last)),
            attempt(lambda: runs.train(run, self.config)),
        ]
        return REFUSED if REFUSED in outcomes else TAKEN


def _replace(content: dict[str, Any], new: Any) -> None:
    content.clear()
    content.update(new if isinstance(new, dict) else {"format": new})


class Knobs:
    """params.yaml and a variant, changed as text and as data; assignments after --set."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "p.yaml"
        self.text = (Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8")
        self.data = yaml.safe_load(self.text)

    def once(self, rng: random.Random) -> str:
        match rng.randrange(4):
            case 0:
                self.path.write_bytes(changed_bytes(rng, self.text.encode()))
            case 1:
                with contextlib.suppress(UnicodeEncodeError, yaml.YAMLError):
                    self.path.write_text(yaml.safe_dump(changed_value(rng, self.data)), encoding="utf-8")
            case 2:
                variant = self.data["variants"]["nanogpt-cpu"]
                with contextlib.suppress(UnicodeEncodeError, yaml.YAMLError):
                    self.path.write_text(yaml.safe_dump(changed_value(rng, variant)), encoding="utf-8")
                return attempt(lambda: load_train_config(self.path))
            case _:
                keys = ["max_steps", "model.n_layer", "model.kind", "optimizer.beta1", "order", "model", "", ".", "a.b"]
                values = [*map(str, NASTY), "[", "{a", "&a [*a]", "!!python/name:os.system", "0x" + "f" * 9000, "- -"]
                assignments = [
                    f"{rng.choice(keys)}{rng.choice(['=', '=', '=', ''])}{rng.choice(values)}"
                    for _ in range(rng.randrange(3))
                ]
                return attempt(lambda: override(TrainConfig(), assignments))
        return attempt(lambda: load_params(self.path)) if self.path.exists() else REFUSED


class Texts:
    """Files and folders of any bytes and names, in any encoding, through reading, tokenizing and splitting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "texts"

    def once(self, rng: random.Random) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for _ in range(rng.randrange(4)):
            name = os.fsdecode(bytes(rng.choice([*range(1, 47), *range(48, 256)]) for _ in range(rng.randrange(1, 8))))
            with contextlib.suppress(OSError):  # . and ..
                (self.folder / name).write_bytes(self._content(rng))
        if rng.random() < 0.3:
            (self.folder / "link").symlink_to(rng.choice(["link", ".", "nowhere", "/dev/null", ".."[:1]]))
        encoding = rng.choice(["utf-8", "utf-8", "utf-16", "latin-1", "ascii", "utf-7", "idna", "hex", "", "nope"])
        path = rng.choice([self.folder, *self.folder.iterdir(), self.folder / "missing"])

        def use() -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                text = read_text(path, encoding)
            tokenizer = build_tokenizer(TokenizerConfig(rng.choice(["character", "byte"])), text)
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            splits = split_tokens(ids, tokenizer, rng.choice([0.1, 0.5, 0.99]))
            require_size(splits, rng.choice([1, 8]))
            write_splits(self.folder / "splits", splits)
            assert load_splits(self.folder / "splits").fingerprint == splits.fingerprint

        return attempt(use)

    def _content(self, rng: random.Random) -> bytes:
        match rng.randrange(5):
            case 0:
                return rng.randbytes(rng.randrange(60))
            case 1:
                return "".join(chr(rng.choice([10, 13, 65, 0xE9, 0x3B1, 0xFEFF, 0x1F600])) for _ in range(60)).encode()
            case 2:
                return "to be\r\nor not".encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "cp037"]))
            case 3:
                return bytes(rng.randrange(100))
            case _:
                return b"to be or not to be " * rng.randrange(20)


class Tokenizers:
    """A tokenizer's file, changed as bytes and as data."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer.json"
        self.whole = []
        for kind in ("character", "byte"):
            build_tokenizer(TokenizerConfig(kind), "to be or not 🙂 мир").save(self.path)
            self.whole.append(self.path.read_bytes())

    def once(self, rng: random.Random) -> str:
        whole = rng.choice(self.whole)
        if rng.random() < 0.5:
            self.path.write_bytes(changed_bytes(rng, whole))
        else:
            self.path.write_text(json.dumps(changed_value(rng, json.loads(whole))))

        def use() -> None:
            tokenizer = load_tokenizer(self.path)
            ids = tokenizer.encode("to be 漢 🙂", errors=rng.choice(["replace", "skip"]))
            tokenizer.decode(ids)

        return attempt(use)


class Data:
    """A folder of shards whose files were changed, opened and read."""

    def __init__(self, folder: Path) -> None:
        self.whole, self.copy = folder / "whole", folder / "copy"
        tokenizer = build_tokenizer(TokenizerConfig(), runs.words())
        write_splits(self.whole, split_tokens(tokenizer.encode(runs.words()), tokenizer, 0.1))

    def once(self, rng: random.Random) -> str:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.whole, self.copy)
        path = self.copy / rng.choice(sorted(os.listdir(self.copy)))
        match rng.randrange(3):
            case 0:
                path.write_bytes(changed_bytes(rng, path.read_bytes()))
            case 1 if path.suffix == ".json":
                path.write_text(json.dumps(changed_value(rng, json.loads(path.read_bytes()))))
            case 1:
                np.save(
                    path, rng.choice([np.zeros(0), np.zeros((2, 2), np.uint8), np.arange(5), np.zeros(9, np.uint8)])
                )
            case _:
                path.unlink()

        def use() -> None:
            splits = load_splits(self.copy)
            splits.train[:10], splits.val_with_context, splits.fingerprint, splits.val_bytes_per_token

        return attempt(use)


class Commands:
    """Command lines of the commands' own words and of others, beside files of the user's, which stay as they are."""

    TINY = "--set max_steps=2 --set batch_size=2 --set eval_interval=1 --set device=cpu --set model.kind=bigram"
    WORDS = (
        *("train", "sample", "eval", "compare", "info", "my.txt", "runs/my", "mine", "nothing", ".", "/dev/null", ""),
        *("--out", "--minutes", "--preset", "--config", "--like", "--set", "--tokenizer", "--teacher", "--seed"),
        *("--val-fraction", "--encoding", "--prompt", "--stream", "--num-samples", "--max-new-tokens", "--temperature"),
        *(
            "--top-k",
            "--top-p",
            "--min-p",
            "--keep",
            "--stop",
            "--allow",
            "--ban",
            "--logprobs",
            "--interactive",
            "--engine",
            "--prompt-file",
            "--unknown",
            "--data",
            "--text",
            "--protocol",
            "--json",
            "--page",
            "--help",
            "--version",
        ),
        *("0", "1", "2", "-1", "nan", "1e308", "9" * 30, "x", "byte", "modern", "to be", "Ω", "full", "all", "skip"),
        *("model.n_layer=1", "max_steps=1", "batch_size=-0x1", "model.block_size=4", "a=b", "--", "~", "\udce9"),
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self._begin()

    def _begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / "my.txt").write_text(runs.words(600), encoding="utf-8")
        (self.folder / "mine").mkdir()
        for name in ("mine/step-000001.txt", "mine/config.yaml", "mine/data.txt"):
            (self.folder / name).write_text(runs.words(500), encoding="utf-8")
        self._run(f"train my.txt {self.TINY}".split())
        self.before = everything(self.folder)

    def once(self, rng: random.Random) -> str:
        words = [rng.choice(self.WORDS) for _ in range(rng.randrange(1, 7))]
        if rng.random() < 0.7:
            words = [
                rng.choice(["train my.txt", "train mine", "sample runs/my", "eval runs/my", "compare runs/my"]),
                *words,
            ]
            words = [*words[0].split(), *words[1:]]
        if "train" in words[:1]:
            words += [*self.TINY.split(), "--out", rng.choice(["runs/new", "runs/my", "mine", ".", "my.txt", "runs"])]
        elif words[0] == "sample":
            words += ["--max-new-tokens", rng.choice(["0", "3", "-1"])]
        code = self._run(words)
        assert code in (0, 2), f"exit code {code}"
        after = everything(self.folder)
        lost = [name for name in self.before if after.get(name) != self.before[name] and name.split("/")[0] != "data"]
        if lost:
            self._begin()  # or every later piece would fail by what this one did
        assert not lost, f"changed or lost: {lost} by {words}"
        for path in [*self.folder.iterdir(), *(self.folder / "runs").iterdir()]:
            if str(path.relative_to(self.folder)) not in self.before:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return TAKEN if code == 0 else REFUSED

    def _run(self, words: list[str]) -> int:
        former = os.getcwd(), sys.argv
        out, err = io.StringIO(), io.StringIO()
        try:
            os.chdir(self.folder)
            sys.argv = ["chargpt", *words]
            with runs.one_thread(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            assert code == 0 or err.getvalue().strip(), "an exit without a word"
            return code
        finally:
            os.chdir(former[0])
            sys.argv = former[1]
        return 0


class Kernels:
    """Tensors of any kind and shape on each operation, against the reference."""

    # Inside the dispatch of the second, torch's own operators read the wrong memory of the first, or crash.
    TORCH_FAILS = (
        *((kind, "wrapped") for kind in ("negative", "imaginary", "zero", "functional")),
        ("functional", "masked"),
    )

    def __init__(self, folder: Path) -> None:
        warnings.simplefilter("ignore")

    def once(self, rng: random.Random) -> str:
        _, f = OPERATIONS[name := rng.choice(sorted(OPERATIONS))]
        sizes = [rng.choice([0, 1, 2, 3, 4, 5, 8, 16, 17]) for _ in range(rng.choice([2, 3, 3, 3, 4, 4]))]
        if name == "attention":
            sizes = [rng.choice([0, 1, 2]), 2, rng.choice([0, 1, 5, 33]), rng.choice([1, 2, 4, 8, 48])]
        if name in ("cross_entropy", "mean", "head"):
            sizes = [2, 3, rng.choice([5, 6, 64])]
        scale = rng.choice([0.0, 1.0, 1e3, 1e-30])
        x = scale * torch.randn(sizes, generator=torch.Generator().manual_seed(rng.randrange(2**30)))
        x = x.to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
        kinds = rng.sample(sorted(KINDS), rng.choice([0, 1, 1, 2]))
        if tuple(kinds) in self.TORCH_FAILS:
            return REFUSED
        for kind in kinds:
            try:
                x = KINDS[kind](x)
            except Exception:  # torch cannot make it
                return REFUSED
        results: list[Any] = []
        for impl in ("auto", "torch"):
            try:
                results.append(f(x, impl=impl))
            except Exception as error:
                results.append(error)
        got, wanted = results
        if isinstance(got, Exception):
            return REFUSED
        assert not isinstance(wanted, Exception), f"{name} of {sizes}: a result where the reference has {wanted!r}"
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        if not value(got).is_meta and not got.is_complex():
            tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-4
            size = value(wanted).abs().nan_to_num(0, 0, 0).max().item() if value(wanted).numel() else 0.0
            torch.testing.assert_close(
                value(got), value(wanted), rtol=tolerance, atol=tolerance * (1e-3 + size), equal_nan=True
            )
        return TAKEN


class Decoder:
    """Transformers of any parts, read by the C++ decoder in pieces and with neighbours of any number, against torch."""

    PARTS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "position": ("none", "learned", "rotary"),
        "norm": ("none", "layernorm", "rmsnorm"),
        "mlp": ("none", "relu", "gelu", "relu2", "swiglu"),
        "mlp_width": (0.5, 1.0, 4.0),
        "n_layer": (1, 2),
        "n_head": (1, 2, 3),
        "block_size": (1, 2, 15, 16, 17, 40, 70),
        **dict.fromkeys(("bias", "qk_norm", "tied_head", "bigram_embeddings", "value_embeddings"), (False, True)),
        "logit_softcap": (None, 3.0),
    }

    def __init__(self, folder: Path) -> None:
        pass

    @torch.no_grad()
    def once(self, rng: random.Random) -> str:
        parts = {name: rng.choice(values) for name, values in self.PARTS.items()}
        parts["n_embd"] = parts["n_head"] * rng.choice([2, 4, 6, 16, 18])
        parts["n_kv_head"] = rng.choice([None, 1, parts["n_head"]])
        vocabulary, seed = rng.choice([1, 2, 13, 65, 300]), rng.randrange(2**31)
        model = build_model(TransformerConfig(**parts), vocabulary, seed, "torch").eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter += 0.5 / parameter.shape[-1] ** 0.5 * torch.randn(parameter.shape, generator=generator)
        size, streams = model.block_size, rng.choice([1, 2, 5])
        keep = rng.choice([None, 1, size, rng.randint(1, 2 * size)])
        kept = max(1, size // 2) if keep is None else min(keep, size)
        held = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, size))] for _ in range(streams)]
        if rng.random() < 0.3:
            held = [held[0]] * streams  # read as one
        held = [list(window) for window in held]
        precision = rng.choice(get_args(Precision))
        decoder = NativeDecoder(model, streams, precision, rng.choice([1, 1, 1, 2, 3]))
        alone = NativeDecoder(model, 1, precision, 1)
        config = SampleConfig(
            temperature=rng.choice([0.0, 1e-9, 0.8, 50.0]),
            top_k=rng.choice([None, 1, 3]),
            top_p=rng.choice([None, 0.5, 1.0]),
            min_p=rng.choice([None, 0.3]),
            keep=keep,
            seed=seed,
        )
        bias = torch.where(torch.arange(vocabulary) % 3 == 0, 0.0, -torch.inf) if rng.random() < 0.5 else None
        decoder.begin(held, config, bias)
        exact = copy.deepcopy(model).double()
        for _ in range(rng.randint(1, 6)):
            got = decoder.read()
            if precision == "fp32":
                wanted = torch.stack([exact.logits(exact.hidden(torch.tensor([window]))[0, -1]) for window in held])
                torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
            for window, row in zip(held, got, strict=True):
                alone.begin([window])
                assert torch.equal(alone.read()[0], row), "bits that depend on neighbours"
            new = [rng.randrange(vocabulary) for _ in range(streams)]
            decoder.append(new)
            for window, token in zip(held, new, strict=True):
                window.append(token)
                if len(window) > size:
                    del window[:-kept]
        count = rng.randint(0, 20)
        drawn = list(decoder.generate(count))
        tokens = [token for burst in drawn for token in burst.tokens.flatten().tolist()]
        assert len(tokens) == count * streams
        assert all(0 <= token < vocabulary and (bias is None or token % 3 == 0) for token in tokens)
        assert all((burst.logprobs < 1e-4).all() and burst.logprobs.isfinite().all() for burst in drawn)
        return TAKEN


OWN = {"messages": "/v1/chat/completions", "written": "/look"}  # fields that only one kind of request has


class Requests:
    """What a client may send to the server: fields with other values, bodies with other bytes, other headers."""

    BODIES: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "model": "m",
            "prompt": ["to", "be"],
            "max_tokens": 5,
            "n": 2,
            "logprobs": 2,
            "echo": True,
            "stop": ["e", "x"],
        },
        {"model": "m", "prompt": [1, 2], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        {"model": "m", "max_tokens": 2, "temperature": 0.5, "top_p": 0.5, "seed": 1, "logit_bias": {"1": 2.0}},
        {
            "model": "m",
            "max_tokens": 2,
            "top_k": 1,
            "min_p": 0.1,
            "allow": "tobe",
            "ban": "r",
            "best_of": 1,
            "user": "u",
        },
        {"model": "m", "prompt": "to be", "max_tokens": 2, "return_token_ids": True, "logprobs": 0, "stream": True},
        {"model": "m", "prompt": "to", "written": [1, 2, 3, 1, 2, 3, 1, 2, 3], "top": 3, "attention": True},
        {"model": "m", "messages": [{"role": "user", "content": "to be"}], "max_tokens": 4, "logprobs": True},
        {"model": "m", "messages": [{"role": "system", "content": [{"type": "text", "text": "é"}]}], "stream": True},
    )
    PATHS = (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/m",
        "/metrics",
        "/health",
        "/look",
        "/",
        "/page.js",
        "/x",
        "/../m",
    )

    def __init__(self, folder: Path) -> None:
        tokenizer = build_tokenizer(TokenizerConfig(), runs.words())
        config = TransformerConfig(block_size=8, n_layer=1, n_head=1, n_embd=8)
        engine = ModelEngine(build_model(config, tokenizer.vocab_size, 1).eval(), tokenizer, slots=3)
        self.app, self.loop = build_app({"m": engine}), asyncio.new_event_loop()

    def once(self, rng: random.Random) -> str:
        content = rng.choice(self.BODIES)
        path = next((path for field, path in OWN.items() if field in content), "/v1/completions")
        if rng.random() < 0.8:
            content = changed_value(rng, content)
        body = json.dumps(content).encode()
        if rng.random() < 0.2:
            body = changed_bytes(rng, body)
        headers = {b"host": b"localhost", b"content-type": b"application/json"}
        method = "POST"
        if rng.random() < 0.1:
            path, method = rng.choice(self.PATHS), rng.choice(["GET", "POST", "PUT", "HEAD"])
        if rng.random() < 0.1:
            headers[rng.choice(list(headers))] = rng.choice(
                [b"", b"x", b"localhost:1", b"text/plain", rng.randbytes(9)]
            )
        status, answer = self.loop.run_until_complete(self._ask(method, path, headers, body))
        assert status in (200, 400, 404, 405, 413, 415, 429), f"{status}: {answer[:200]!r}"
        assert b"Traceback" not in answer
        if status != 200 and method != "HEAD":
            assert json.loads(answer)["error"]["message"]
        return TAKEN if status == 200 else REFUSED

    async def _ask(self, method: str, path: str, headers: dict[bytes, bytes], body: bytes) -> tuple[int, bytes]:
        """Through the server's own interface to the web, without a socket."""
        sent, status, answer = False, 0, b""

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await asyncio.sleep(60)  # the client waits
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status, answer
            status, answer = message.get("status", status), answer + message.get("body", b"")

        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": list(headers.items()), "http_version": "1.1", "scheme": "http", "root_path": ""}
        scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "asgi": {"version": "3.0"}}
        await self.app(scope, receive, send)  # type: ignore[arg-type]
        return status, answer


class Kills:
    """A run killed at random moments, again and again, ends with the bits of one that was not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, tuple[int, dict[str, Any]]] = {}

    def once(self, rng: random.Random) -> str:
        name = rng.choice(sorted(runs.CASES))
        config = runs.CASES[name]
        if name not in self.known:
            moments = runs.count_moments(self.folder / f"counted-{name}", config)
            self.known[name] = moments, runs.result(self.folder / f"counted-{name}")
        moments, whole = self.known[name]
        folder = self.folder / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        kills = 0
        while not (folder / "metrics.json").exists():
            kill = rng.randint(1, moments) if kills < 6 else None
            code = runs.in_process(folder, config, kill)
            assert code in (0, -9), f"exit code {code}"
            kills += 1
        assert runs.result(folder) == whole, f"{name} ended with other bits"
        return TAKEN


TARGETS: dict[str, Any] = {
    "checkpoints": Checkpoints,
    "knobs": Knobs,
    "texts": Texts,
    "tokenizers": Tokenizers,
    "data": Data,
    "commands": Commands,
    "kernels": Kernels,
    "decoder": Decoder,
    "requests": Requests,
    "kills": Kills,
}
