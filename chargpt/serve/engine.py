"""The streams of one model, served together: a thread that draws some tokens for all of them, again and again.

The one idea to know: streams join and leave between bursts of some milliseconds, and none notices: what one writes is a
function of its prompt, its options and its seed alone.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from chargpt.config import Engine as EngineName
from chargpt.config import SampleConfig
from chargpt.errors import ChargptError
from chargpt.evaluation import token_logits
from chargpt.generation import NativeDecoder, Piece, SampleText, choose_engine, stream_tokens
from chargpt.generation.native import Team
from chargpt.generation.sampler import Drawn
from chargpt.models import LanguageModel
from chargpt.tokenizers import Tokenizer

BURST_SECONDS = 0.01  # the longest that a new stream, or one that is given up, waits for the others
MOST_AT_ONCE = 64  # tokens of a burst
SCORED = 64  # tokens that one window scores of a prompt
ENDED = "the server ends; ask again later"


class BusyError(ChargptError):
    """More waits than the server wants to promise."""


@dataclass(frozen=True)
class Delta:
    """What a job gained: text and tokens, and for each token its likeliest alternatives, (token, ln p) each."""

    piece: Piece
    top: list[list[tuple[int, float]]]


@dataclass(eq=False)
class Job:
    """One sample to write.

    config: its max_new_tokens, stop, seed and cuts; it is sample 0 of that seed, whatever num_samples says
    deliver: called with each Delta, or with the error that ended it
    """

    window: list[int]
    config: SampleConfig
    deliver: Callable[[Delta | ChargptError], None]
    bias: torch.Tensor | None = None  # (V,), float32
    top: int = 0  # alternatives of each token
    given_up: bool = False  # by the client, at any moment
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.config.max_new_tokens


class TorchStreams:
    """What a NativeDecoder does, one stream after the other in torch, for models that C++ cannot decode."""

    def __init__(self, model: LanguageModel, device: torch.device | str) -> None:
        self._model, self._device = model, device
        self._streams: dict[int, object] = {}

    @property
    def running(self) -> list[int]:
        return sorted(self._streams)

    def join(
        self, slot: int, window: list[int], config: SampleConfig, sample: int, bias: torch.Tensor | None = None
    ) -> None:
        assert sample == 0
        idx = torch.tensor([window], device=self._device)
        endless = dataclasses.replace(config, max_new_tokens=2**62)
        self._streams[slot] = stream_tokens(self._model, idx, endless, None if bias is None else bias.to(self._device))

    def leave(self, slot: int) -> None:
        del self._streams[slot]

    def burst(self, count: int, threads: int, *, with_logits: bool = False) -> Drawn:
        steps = [[next(self._streams[slot]) for slot in self.running] for _ in range(count)]  # type: ignore[call-overload]
        tokens, logprobs, logits = (
            torch.cat([torch.cat([step[part] for step in row], 1) for row in steps]).cpu() for part in range(3)
        )
        return Drawn(tokens, logprobs, logits if with_logits else None)


class ModelEngine:
    """One model, and the thread that writes for all who ask.

    slots: streams at a time; others wait their turn, up to `most_waiting`
    texts: of each token alone
    closed: whether it ends, for whoever else works on this model
    hand_over: how to call what delivers a burst's gains, if not at once and in the engine's thread. One call for all
        streams, because waking another thread costs more than a token.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        device: torch.device | str = "cpu",
        engine: EngineName = "auto",
        slots: int = 32,
        most_waiting: int = 1024,
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.slots, self.most_waiting = slots, most_waiting
        self.texts = [tokenizer.decode([token]) for token in range(model.vocab_size)]
        self.chosen = choose_engine(model, engine)
        if self.chosen.engine == "torch":
            self._streams: NativeDecoder | TorchStreams = TorchStreams(model, device)
        else:
            self._streams = NativeDecoder(model, slots, self.chosen.engine)
        self._team = Team(torch.get_num_threads())
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, tuple[Job, SampleText]] = {}  # by slot
        self._changed = threading.Condition()
        self.closed = False
        self.hand_over: Callable[[Callable[[], None]], None] = lambda deliver: deliver()
        self._count = 1  # tokens of the next burst
        self.thread = threading.Thread(target=self._run, name="chargpt-engine", daemon=True)
        self.thread.start()

    @property
    def running(self) -> int:
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        return sum(not job.given_up for job in list(self._waiting))

    def submit(self, jobs: list[Job]) -> None:
        """Write these too. Raises BusyError when too many wait; then none of them is taken."""
        with self._changed:
            if self.closed or self.waiting + len(jobs) > self.most_waiting:
                raise BusyError("too many requests wait already; try again in a moment")
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Stop. Jobs that are not finished get an error."""
        with self._changed:
            self.closed = True
            self._changed.notify()
        self.thread.join()
        self._deliver(
            [(job, ChargptError(ENDED)) for job in [*self._waiting, *(job for job, _ in self._jobs.values())]]
        )
        self._waiting.clear()
        self._jobs.clear()

    # ------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or self._waiting or self._jobs)
                if self.closed:
                    return
                joining = self._free_and_fill()
            for slot, job in joining:
                self._join(slot, job)
            if self._jobs:
                self._burst(joined=bool(joining))

    def _free_and_fill(self) -> list[tuple[int, Job]]:
        for slot, (job, _) in list(self._jobs.items()):
            if job.given_up:
                self._leave(slot)
        free = [slot for slot in range(self.slots) if slot not in self._jobs]
        joining: list[tuple[int, Job]] = []
        while self._waiting and len(joining) < len(free):
            job = self._waiting.popleft()
            if not job.given_up:
                joining.append((free[len(joining)], job))
        return joining

    def _join(self, slot: int, job: Job) -> None:
        try:
            self._streams.join(slot, job.window, job.config, 0, job.bias)
        except Exception as error:  # this one's fault, whatever it is: the others go on
            unknown = ChargptError("the request cannot be served")
            self._deliver([(job, error if isinstance(error, ChargptError) else unknown)])
        else:
            self._jobs[slot] = (job, SampleText(self.tokenizer, job.config.stop))

    def _deliver(self, gained: Sequence[tuple[Job, Delta | ChargptError]]) -> None:
        def deliver() -> None:
            for job, delta in gained:
                job.deliver(delta)

        self.hand_over(deliver)

    def _leave(self, slot: int) -> None:
        del self._jobs[slot]
        self._streams.leave(slot)

    def _burst(self, joined: bool) -> None:
        lefts = [job.left for job, _ in self._jobs.values()]
        count = 1 if joined else min(self._count, *lefts, self._team.most(), MOST_AT_ONCE)
        wanted = max(job.top for job, _ in self._jobs.values())
        try:
            drawn, seconds = self._team.timed(count, partial(self._streams.burst, count, with_logits=wanted > 0))
        except ChargptError as error:  # the model is broken: nobody gets anything
            failed = [(job, error) for job, _ in self._jobs.values()]
            for slot in list(self._jobs):
                self._leave(slot)
            self._deliver(failed)
            return
        self._count = max(1, min(2 * count, int(count * BURST_SECONDS / max(seconds, 1e-9))))
        tokens, logprobs = drawn.tokens.T.tolist(), drawn.logprobs.T.tolist()
        gained: list[tuple[Job, Delta | ChargptError]] = []
        for column, slot in enumerate(sorted(self._jobs)):
            job, text = self._jobs[slot]
            job.left -= count
            piece = text.take(tokens[column], logprobs[column], last=job.left == 0)
            top = []
            if job.top and drawn.logits is not None:
                top = likeliest(drawn.logits[: len(piece.tokens), column], job.top)
            if piece.finish_reason is not None:
                self._leave(slot)
            gained.append((job, Delta(piece, top)))
        self._deliver(gained)


def scores(
    model: LanguageModel,
    tokens: list[int],
    top: int,
    device: torch.device | str = "cpu",
    given_up: Callable[[], bool] = lambda: False,
) -> Delta:
    """What each of tokens[1:] weighs behind those before it, as the `sliding` protocol sees them.

    given_up: whether nobody wants to know any more; asked again and again, and what is returned then ends early
    """
    logprobs: list[float] = []
    rows: list[list[tuple[int, float]]] = []
    for logits, targets in token_logits(model, np.array(tokens), SCORED, device) if len(tokens) > 1 else ():
        logprobs += logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist()
        rows += likeliest(logits, top) if top else []
        if given_up():
            break
    return Delta(Piece("", tokens[1:], logprobs, "length"), rows)


def likeliest(logits: torch.Tensor, count: int) -> list[list[tuple[int, float]]]:
    """For each row of `logits` (n, V) its likeliest tokens, and ln p of each."""
    best = logits.log_softmax(-1).topk(min(count, logits.size(-1)))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]
