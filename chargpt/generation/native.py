"""Generation in C++: a Transformer's weights packed for reading token by token, and its streams (csrc/cpu/decode.h).

The one idea to know: a token reads every weight once, so the bytes of the weights decide its time. In float32 the
logits are the model's own but for rounding; in bfloat16 the weights of the matrices have half the bytes.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from chargpt.config import SampleConfig
from chargpt.errors import ChargptError
from chargpt.generation.sampler import BROKEN_LOGITS, Drawn
from chargpt.kernels import native
from chargpt.models import LanguageModel, Transformer
from chargpt.runtime import available_memory

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: dict[Precision, int] = {"fp32": 0, "bf16": 1, "int8": 2}  # as in csrc/cpu/decode.h, like these:
NORMS = {"none": 0, "layernorm": 1, "rmsnorm": 2}
ACTIVATIONS = {"none": 0, "relu": 1, "relu2": 2, "gelu": 3, "swiglu": 4}
MOST_AT_ONCE, BURST_SECONDS = 256, 0.02  # tokens, and their time, between two looks at what Python wants


def why_not(model: LanguageModel) -> str | None:
    """Why a model cannot generate in C++ here, as part of a sentence; None when it can."""
    loaded = native.load()
    if loaded.module is None:
        return loaded.problem
    if not isinstance(model, Transformer):
        return f"C++ decodes a single Transformer, not {type(model).__name__}"
    if not model.config.residual:
        return "C++ decodes Transformers with a residual stream"
    if model.head is not None and type(model.head) is not nn.Linear:
        return f"the head is a {type(model.head).__name__}"
    if any(not parameter.is_cpu for parameter in model.parameters()):
        return "the model is not on the CPU"
    return None


def require_room(model: Transformer, slots: int, precision: Precision) -> None:
    """Raises ChargptError when the keys and values of so many streams are more than the memory that is free."""
    config = model.config
    channels = 2 * config.n_layer * (config.n_kv_head or config.n_head) * (config.n_embd // config.n_head)
    needed = slots * model.block_size * channels * (4 if precision == "fp32" else 2)  # bytes
    free = available_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise ChargptError(
            f"keys and values of {slots} streams take {needed / 2**30:.1f} GiB of memory; {free / 2**30:.1f} are free: "
            "take fewer (chargpt serve --slots, chargpt sample --num-samples)"
        )


class NativeDecoder:
    """Streams of one model, each in one of `slots` slots, that come and go. Takes the weights as they are now.

    What a stream writes depends on nothing but its window and its options: not on what else runs, since when, or on how
    many threads.

    precision: of the matrices and what they multiply

    Raises ChargptError when `why_not` has a reason, or the streams' keys and values have no room in memory.
    """

    def __init__(
        self, model: LanguageModel, slots: int, precision: Precision = "fp32", threads: int | None = None
    ) -> None:
        problem, module = why_not(model), native.load().module
        if problem is not None or module is None:
            raise ChargptError(f"this model cannot be decoded in C++: {problem}")
        assert isinstance(model, Transformer)
        require_room(model, slots, precision)
        self.block_size, self.vocab_size, self.slots = model.block_size, model.vocab_size, slots
        self.threads = threads or torch.get_num_threads()
        with torch.no_grad():
            self._decoder = module.Decoder(_described(model, precision), slots, self.threads)

    @property
    def running(self) -> list[int]:
        """The slots of all streams, in ascending order, which is that of everything below."""
        return self._decoder.running()  # type: ignore[no-any-return]

    def join(
        self, slot: int, window: list[int], config: SampleConfig, sample: int, bias: torch.Tensor | None = None
    ) -> None:
        """Begin a stream in a slot, with the last block_size tokens of `window`, as sample number `sample` of `config`.

        bias: (V,), float32, added to its logits
        """
        keep = max(1, self.block_size // 2) if config.keep is None else min(config.keep, self.block_size)
        self._decoder.begin(
            slot,
            window[-self.block_size :],
            config.seed,
            sample,
            keep,
            config.temperature,
            min(config.top_k or 0, self.vocab_size),
            config.top_p or 1.0,
            config.min_p or 0.0,
            bias,
        )

    def leave(self, slot: int) -> None:
        self._decoder.end(slot)

    def begin(
        self, windows: list[list[int]], config: SampleConfig | None = None, bias: torch.Tensor | None = None
    ) -> None:
        """Forget all; stream i begins with `windows[i]`, as sample i."""
        for slot in self.running:
            self.leave(slot)
        for i, window in enumerate(windows):
            self.join(i, window, config or SampleConfig(), i, bias)

    def read(self) -> torch.Tensor:
        """Logits (streams, V) after all tokens. A window that became too long goes on with its last `config.keep`."""
        return self._decoder.read(self.threads)  # type: ignore[no-any-return]

    def append(self, tokens: list[int]) -> None:
        """One more token for each stream."""
        self._decoder.append(tokens)

    def burst(self, count: int, threads: int, *, with_logits: bool = False) -> Drawn:
        """The next `count` tokens of each stream, drawn as `stream_tokens` says, with the interpreter's lock released.

        Raises ChargptError when logits have no softmax.
        """
        drawn = self._decoder.generate(count, threads, with_logits)
        if drawn is None:
            raise ChargptError(BROKEN_LOGITS)
        return Drawn(*drawn)

    def generate(self, count: int) -> Iterator[Drawn]:
        """Yield the next `count` tokens of each stream: one at once, then as many together as take BURST_SECONDS."""
        position, burst = 0, 1
        team = Team(self.threads, alone=not self._decoder.apart(self.threads))
        while position < count:
            burst = min(burst, team.most(), count - position)
            drawn, seconds = team.timed(burst, partial(self.burst, burst))
            yield drawn
            position += burst
            burst = max(1, min(2 * burst, int(burst * BURST_SECONDS / max(seconds, 1e-9))))


class Team:
    """How many threads to decode with: all, unless one alone is faster, as where other processes want the cores too.

    Threads that share the work on a stream wait for each other many times a token, and one that lost its core keeps the
    others waiting. The number changes no bits, so now and then the other one is tried; ever more seldom, while that
    changes nothing.

    alone: whether one thread may be faster
    """

    SHORT = 4  # bursts at the beginning, which are too short to tell
    TRIAL, TOKENS = 2, 16  # bursts of a trial, the fastest of which counts, and their length
    FIRST, MOST = 16, 256  # bursts from one trial to the next

    def __init__(self, threads: int, alone: bool = True) -> None:
        self.choices = sorted({1, threads}, reverse=True) if alone else [threads]
        self.seconds = dict.fromkeys(self.choices, math.inf)  # for a token, at the last trial
        self.best, self.every, self.burst = threads, self.FIRST, -self.SHORT

    @property
    def tried(self) -> int | None:
        """The number of threads that the next burst tries."""
        trial = self.burst // self.TRIAL
        return self.choices[trial] if len(self.choices) > 1 and 0 <= trial < len(self.choices) else None

    def most(self) -> int:
        """The most tokens of the next burst."""
        return MOST_AT_ONCE if self.tried is None else self.TOKENS

    def timed(self, count: int, decode: Callable[[int], T]) -> tuple[T, float]:
        """What `decode` returns with a number of threads, for `count` tokens, and the seconds that it took."""
        tried = self.tried
        start = time.perf_counter()
        result = decode(self.best if tried is None else tried)
        seconds = time.perf_counter() - start
        if tried is not None:
            first = self.burst % self.TRIAL == 0
            self.seconds[tried] = min(seconds / count, math.inf if first else self.seconds[tried])
        self.burst += 1
        if self.burst == self.TRIAL * len(self.choices):
            best = min(self.choices, key=lambda threads: self.seconds[threads])
            self.every = min(2 * self.every, self.MOST) if best == self.best else self.FIRST
            self.best = best
        if self.burst == self.every:
            self.burst = 0
        return result, seconds


def _described(model: Transformer, precision: Precision) -> dict[str, Any]:
    """What the C++ side needs of a model."""
    config = model.config

    def plain(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.detach().float().contiguous()

    def table(x: torch.Tensor | None) -> torch.Tensor | None:
        """Read where it lies, so in memory of its own: training may go on."""
        return None if x is None else x.detach().float().contiguous().clone()

    def matrix(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Packed, so copied."""
        return plain(layer.weight), plain(layer.bias)

    def gain(norm: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return table(norm.weight), table(norm.bias)

    def layer(block: Any) -> dict[str, Any]:
        attention, rows = block.attention, block.attention.value_embedding
        described = {
            "attention_norm": gain(block.attention_norm),
            "mlp_norm": (None, None) if block.mlp is None else gain(block.mlp_norm),
            "qkv": matrix(attention.qkv),
            "projection": matrix(attention.projection),
            "value_embedding": None if rows is None else table(rows.weight),
        }
        if block.mlp is not None:
            described |= {"expand": matrix(block.mlp.expand), "contract": matrix(block.mlp.projection)}
        return described

    blocks: list[Any] = list(model.blocks)
    rotary = blocks[0].attention.rotary
    cos, sin = (None, None) if rotary is None else rotary.angles()
    head = (model.token_embedding.weight, None) if model.head is None else (model.head.weight, model.head.bias)
    bigrams, positions = model.bigram_embedding, model.position_embedding
    return {
        "precision": PRECISIONS[precision],
        "V": model.vocab_size,
        "block_size": model.block_size,
        "C": config.n_embd,
        "H": config.n_head,
        "H_kv": config.n_kv_head or config.n_head,
        "D": config.n_embd // config.n_head,
        "hidden": round(config.mlp_width * config.n_embd),
        "norm": NORMS[config.norm],
        "activation": ACTIVATIONS[config.mlp],
        "qk_norm": config.qk_norm,
        "softcap": config.logit_softcap or 0.0,
        "token_embedding": table(model.token_embedding.weight),
        "bigram_embedding": None if bigrams is None else table(bigrams.weight),
        "bigram_rows": 0 if bigrams is None else bigrams.num_embeddings,
        "position_embedding": None if positions is None else table(positions.weight),
        "cos": table(cos),
        "sin": table(sin),
        "layers": [layer(block) for block in blocks],
        "norm_gain": gain(model.norm),
        "head": tuple(plain(x) for x in head),
    }
