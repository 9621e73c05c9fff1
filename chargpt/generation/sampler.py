"""Generation, as small pure functions: logits to probabilities, probabilities to a token, tokens to text."""

from collections.abc import Iterator

import torch

from chargpt.config import SampleConfig
from chargpt.errors import ChargptError, TokenizerError
from chargpt.models import LanguageModel
from chargpt.tokenizers import Tokenizer


def next_token_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Probabilities (B, V), float32, of the next token from its logits (B, V).

    Temperature divides the logits; 0 puts everything on the likeliest token. Then `top_k` keeps exactly the k
    likeliest, and `top_p` the smallest set of the likeliest of these that reaches that share of them (Holtzman et al.
    2019, arXiv 1904.09751, section 3.1), always at least one. Of equally likely tokens the smaller id comes first.
    Raises ChargptError when the logits have no softmax: one is NaN or +∞, or all are −∞.
    """
    likeliest = logits.amax(-1, keepdim=True)  # (B, 1); NaN if any logit is
    if not torch.isfinite(likeliest).all():
        raise ChargptError("the model's logits are not finite numbers: its weights are broken; use another checkpoint")
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.size(-1)).float()
    # In float64, and after the maximum is taken away, no temperature is so small that it makes ∞ − ∞.
    probabilities = ((logits - likeliest).double() / temperature).softmax(-1)
    if top_k is not None or top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)  # (B, V)
        if top_k is not None:
            ordered[:, top_k:] = 0.0
        if top_p is not None and top_p < 1:  # at 1 rounding must not cut the tail
            before = ordered.cumsum(-1) - ordered  # probability of the likelier tokens
            ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities.float()


@torch.no_grad()
def stream_tokens(
    model: LanguageModel,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """Yield `max_new_tokens` times the next token (B, 1) after `idx` (B, T); the model sees the last block_size."""
    window = idx
    for _ in range(max_new_tokens):
        window = window[:, -model.block_size :]
        logits = model.logits(model.hidden(window)[:, -1])  # (B, V)
        probabilities = next_token_probabilities(logits, temperature, top_k, top_p)  # (B, V)
        token = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
        window = torch.cat([window, token], dim=1)
        yield token


def generate(model: LanguageModel, idx: torch.Tensor, max_new_tokens: int, **options: object) -> torch.Tensor:
    """`idx` (B, T) with `max_new_tokens` more: (B, T + n). Options as in `stream_tokens`."""
    return torch.cat([idx, *stream_tokens(model, idx, max_new_tokens, **options)], dim=1)  # type: ignore[arg-type]


def stream_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, config: SampleConfig, device: torch.device | str = "cpu"
) -> Iterator[list[str]]:
    """Yield what each of `config.num_samples` continuations of `prompt` gains, token by token.

    A token that ends inside a character gains nothing yet. Seeded by `config.seed`. Raises TokenizerError when the
    prompt has unknown characters and `config.unknown` is "strict".
    """
    idx = prompt_tokens(tokenizer, prompt, config.unknown).to(device).expand(config.num_samples, -1)  # (B, T)
    return _stream(model, tokenizer, idx, config)  # so that an error of the prompt comes before anything is shown


def _stream(model: LanguageModel, tokenizer: Tokenizer, idx: torch.Tensor, config: SampleConfig) -> Iterator[list[str]]:
    device = idx.device
    generator = torch.Generator(device=device).manual_seed(config.seed)
    decoders = [tokenizer.decoder() for _ in range(config.num_samples)]
    for token in stream_tokens(
        model,
        idx,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=generator,
    ):
        yield [decode(row) for decode, row in zip(decoders, token.cpu().numpy(), strict=True)]


def generate_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, config: SampleConfig, device: torch.device | str = "cpu"
) -> list[str]:
    """The prompt and its continuation, `config.num_samples` times. Errors as in `stream_text`."""
    steps = list(stream_text(model, tokenizer, prompt, config, device))
    return [prompt + "".join(step[i] for step in steps) for i in range(config.num_samples)]


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
