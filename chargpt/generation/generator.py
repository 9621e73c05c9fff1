"""Text from a model, in pieces or as a whole: a prompt goes in, several samples come out.

The one idea to know: which engine draws the tokens, and in how large bursts they come, changes neither what is drawn
nor the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from chargpt.config import Engine, SampleConfig
from chargpt.errors import ConfigError, TokenizerError
from chargpt.generation.native import NativeDecoder, Precision, why_not
from chargpt.generation.sampler import Drawn, stream_tokens
from chargpt.kernels import native
from chargpt.models import LanguageModel
from chargpt.tokenizers import Tokenizer

FinishReason = Literal["length", "stop"]


@dataclass(frozen=True)
class Piece:
    """What a sample gains at a step."""

    text: str  # "" where a token ends inside a character, or may begin a stop text
    tokens: list[int]
    logprobs: list[float]  # of the tokens, as of a Completion
    finish_reason: FinishReason | None  # at the sample's end


@dataclass(frozen=True)
class Completion:
    """A whole sample."""

    text: str  # behind the prompt, without the stop text
    tokens: list[int]  # those of the stop text too
    logprobs: list[float]  # ln p of each token by the model alone, before temperature and cuts
    finish_reason: FinishReason


class Generator:
    """A model and its tokenizer, ready to write. Takes the weights as they are when it is first used."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self._idle: dict[tuple[int, Precision], NativeDecoder] = {}

    def generate(self, prompt: str, config: SampleConfig | None = None) -> list[Completion]:
        """`config.num_samples` continuations of `prompt`. Errors as of `stream`."""
        config = config or SampleConfig()
        steps = list(self.stream(prompt, config))
        return [_joined([step[i] for step in steps]) for i in range(config.num_samples)]

    def stream(self, prompt: str, config: SampleConfig | None = None) -> Iterator[list[Piece]]:
        """Yield what each of `config.num_samples` continuations of `prompt` gains, some tokens at a time.

        Text that may begin a stop text is held back until more of it comes, or the end. A sample that met a stop text
        gains nothing more, and when all have, that is the end.

        Raises, before anything is drawn: TokenizerError when the prompt has unknown characters and `config.unknown` is
        "strict", or when `config.allow` or `config.ban` has some; ConfigError when nothing may come, or the engine
        cannot work here.
        """
        config = config or SampleConfig()
        idx = prompt_tokens(self.tokenizer, prompt, config.unknown).to(self.device).expand(config.num_samples, -1)
        bias = token_bias(self.tokenizer, config.allow, config.ban)
        return self._pieces(self._drawn(idx, config, bias), config)

    def _drawn(self, idx: torch.Tensor, config: SampleConfig, bias: torch.Tensor | None) -> Iterator[Drawn]:
        """The tokens after `idx` (B, T), by the engine that `config` names."""
        engine, _ = choose_engine(self.model, config.engine)
        if engine == "torch":
            return stream_tokens(self.model, idx, config, None if bias is None else bias.to(self.device))
        return self._decoded(idx, config, bias, engine)

    def _decoded(
        self, idx: torch.Tensor, config: SampleConfig, bias: torch.Tensor | None, precision: Precision
    ) -> Iterator[Drawn]:
        key = len(idx), precision
        decoder = self._idle.pop(key, None) or NativeDecoder(self.model, *key)  # one that no other stream uses
        try:
            decoder.begin(idx.tolist(), config, bias)
            yield from decoder.generate(config.max_new_tokens)
        finally:
            self._idle = {key: decoder}

    def _pieces(self, drawn: Iterator[Drawn], config: SampleConfig) -> Iterator[list[Piece]]:
        samples = [SampleText(self.tokenizer, config.stop) for _ in range(config.num_samples)]
        left = config.max_new_tokens
        for tokens, logprobs, _ in drawn:
            left -= len(tokens)
            rows = zip(samples, tokens.T.tolist(), logprobs.T.tolist(), strict=True)
            yield [sample.take(some, of_some, last=left == 0) for sample, some, of_some in rows]
            if all(sample.until.reached for sample in samples):
                return


class SampleText:
    """The text of one sample, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.decode, self.until = tokenizer.decoder(), Until(stop)

    def take(self, tokens: list[int], logprobs: list[float], last: bool) -> Piece:
        until = self.until
        if until.reached:
            return Piece("", [], [], None)
        if not until.stops:
            return Piece(self.decode(tokens), tokens, logprobs, "length" if last else None)
        text, count = "", 0
        while count < len(tokens) and not until.reached:
            text += until(self.decode(tokens[count : count + 1]))
            count += 1
        reason: FinishReason | None = "stop" if until.reached else "length" if last else None
        return Piece(text + (until.held if last else ""), tokens[:count], logprobs[:count], reason)


def _joined(pieces: list[Piece]) -> Completion:
    return Completion(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [logprob for piece in pieces for logprob in piece.logprobs],
        next((piece.finish_reason for piece in pieces if piece.finish_reason), "length"),
    )


def generate_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, config: SampleConfig, device: torch.device | str = "cpu"
) -> list[str]:
    """The prompt and its continuation, `config.num_samples` times. Errors as of `Generator.stream`."""
    return [prompt + completion.text for completion in Generator(model, tokenizer, device).generate(prompt, config)]


class Chosen(NamedTuple):
    engine: Literal["torch", "fp32", "bf16", "int8"]  # torch, or C++ in that precision
    why: str


def choose_engine(model: LanguageModel, engine: Engine = "auto") -> Chosen:
    """What generates, and why; "auto" takes int8 where C++ can.

    Raises ConfigError when C++ is asked for by name and cannot.
    """
    problem = None if engine == "torch" else why_not(model)
    if engine == "auto":
        problem = problem or native.unmeasured()
        return Chosen("torch", problem) if problem else Chosen("int8", "the fastest, within 0.0003 nats a character")
    if problem is not None:
        raise ConfigError(f"engine {engine} cannot generate here: {problem}; leave it at auto")
    return Chosen(engine, "asked for")


class Until:
    """Lets text through up to the first of some texts. What may be the beginning of one is held back.

    The first is the one that is complete first, and of several that end together the longest. So it does not matter in
    which pieces the text comes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held, self.reached = "", False

    def __call__(self, piece: str) -> str:
        """What may be shown now, after `piece` came."""
        if self.reached:
            return ""
        text = self.held + piece
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.held, self.reached = "", True
            _, place = min(found)
            return text[:place]
        length = max((len(stop) for stop in self.stops), default=0)
        begins = next((n for n in range(min(length, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self.held = text[len(text) - begins :]
        return text[: len(text) - begins]

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self.stops)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, unknown: str = "strict") -> torch.Tensor:
    """Token ids (1, T) to start from; for an empty prompt a newline if the vocabulary has one, else id 0.

    Raises TokenizerError when nothing of the prompt is left to start from.
    """
    if not prompt:
        newline = tokenizer.encode("\n", errors="skip")
        return torch.tensor([[int(newline[0]) if len(newline) else 0]])
    ids = tokenizer.encode(prompt, errors=unknown)  # type: ignore[arg-type]
    if not len(ids):
        raise TokenizerError(f"no character of the prompt {prompt!r} is in the vocabulary; choose another prompt")
    return torch.tensor([ids.tolist()])


def token_bias(tokenizer: Tokenizer, allow: str | None, ban: str) -> torch.Tensor | None:
    """(V,), float32: 0, or −∞ for tokens with a character that is in `ban`, or not in `allow`; None if all may come.

    Raises TokenizerError for characters that no token has, ConfigError when no token is left.
    """
    if allow is None and not ban:
        return None
    texts = [set(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)]
    for name, characters in (("allow", allow or ""), ("ban", ban)):
        missing = sorted(set(characters) - set().union(*texts))
        if missing:
            raise TokenizerError(f"no token of this model has the character {missing[0]!r}; leave it out of {name}")
    free = [(allow is None or text <= set(allow)) and not text & set(ban) for text in texts]
    if not any(free):
        raise ConfigError("allow and ban leave no token that may come; ban less, or allow more")
    return torch.where(torch.tensor(free), 0.0, -torch.inf)
