"""With a cache a model says what it says without one, at every step, whatever its parts."""

import itertools
from collections.abc import Callable

import pytest
import torch

from chargpt.config import BigramConfig, ModelConfig, SampleConfig, TransformerConfig
from chargpt.generation import generate
from chargpt.generation.graph import GraphedReader, reader
from chargpt.generation.sampler import stream_tokens
from chargpt.models import Ensemble, LanguageModel, build_model
from chargpt.models.cache import TransformerCache

V, BLOCK_SIZE = 11, 8


def combinations() -> list[TransformerConfig]:
    """Every pair of choices that a cache could get wrong, and each with one layer and with three."""
    parts = {
        "position": ("none", "learned", "rotary"),
        "norm": ("layernorm", "rmsnorm"),
        "n_kv_head": (None, 1),
        "bigram_embeddings": (False, True),
        "value_embeddings": (False, True),
        "n_layer": (1, 3),
    }
    found = []
    for values in itertools.product(*parts.values()):
        changes = dict(zip(parts, values, strict=True))
        found.append(TransformerConfig(**{"block_size": BLOCK_SIZE, "n_head": 2, "n_embd": 8} | changes))
    return found[::9] + found[1::13]


def random_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """In float64, with weights so large that every part matters."""
    model = build_model(config, V, seed=seed, backend="torch").double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def fed(length: int, rows: int = 3) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("config", combinations(), ids=str)
@torch.no_grad()
def test_reading_piece_by_piece_is_reading_at_once(config: TransformerConfig) -> None:
    model, idx = random_model(config), fed(BLOCK_SIZE)
    whole = model.hidden(idx)
    for pieces in ([1] * BLOCK_SIZE, [3, 1, 1, 3], [7, 1], [BLOCK_SIZE]):
        cache, found = model.new_cache(), []
        for piece in idx.split(pieces, dim=1):
            found.append(model.hidden(piece, cache))
        assert cache.length == BLOCK_SIZE
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-10, atol=1e-12)
        cache.clear()
        torch.testing.assert_close(model.hidden(idx[:, :5], cache), model.hidden(idx[:, :5]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", combinations()[::3], ids=str)
@pytest.mark.parametrize("keep", [None, 1, BLOCK_SIZE - 1, BLOCK_SIZE])
@torch.no_grad()
def test_every_step_is_the_models_answer_to_the_window_that_is_held(
    config: TransformerConfig, keep: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three windows: half of a full one is kept."""
    model, seen = random_model(config), []
    logits_of = model.logits

    def logits(h: torch.Tensor) -> torch.Tensor:
        seen.append(logits_of(h))
        return seen[-1]

    monkeypatch.setattr(model, "logits", logits)
    prompt = fed(3)
    out = generate(model, prompt, 3 * BLOCK_SIZE, seed=1, keep=keep)
    held = 0
    for step, got in enumerate(seen):
        held = 3 if step == 0 else held + 1 if held < BLOCK_SIZE else keep or BLOCK_SIZE // 2
        window = out[:, 3 + step - held : 3 + step]
        torch.testing.assert_close(got, logits_of(model.hidden(window)[:, -1]), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_cache_that_slides_would_say_something_else() -> None:
    """With two layers: the second keeps what the first had made of tokens that are no longer in the window."""
    config = TransformerConfig(block_size=BLOCK_SIZE, n_layer=2, n_head=2, n_embd=8, position="none")
    model, idx = random_model(config), fed(BLOCK_SIZE + 1)
    cache = model.new_cache()
    model.hidden(idx[:, :-1], cache)
    for layer in cache.layers:
        for held in layer._held:
            held.copy_(held.roll(-1, 2))
    cache.length -= 1
    slid = model.hidden(idx[:, -1:], cache)[:, -1]
    assert not torch.allclose(slid, model.hidden(idx[:, 1:])[:, -1], rtol=1e-3)


@torch.no_grad()
def test_an_ensemble_has_a_cache_for_each_member() -> None:
    small = TransformerConfig(block_size=BLOCK_SIZE, n_layer=2, n_head=2, n_embd=8)
    large = TransformerConfig(block_size=2 * BLOCK_SIZE, n_layer=1, n_head=2, n_embd=8, position="rotary")
    ensemble = Ensemble([random_model(small), random_model(large, seed=1)], backend="torch")
    idx, cache = fed(BLOCK_SIZE), ensemble.new_cache()
    found = torch.cat([ensemble.hidden(idx[:, i : i + 1], cache) for i in range(BLOCK_SIZE)], 1)
    torch.testing.assert_close(found, ensemble.hidden(idx), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="9 tokens were fed to a model whose block_size is 8"):
        ensemble.hidden(idx[:, :1], cache)
    cache.clear()
    assert torch.equal(ensemble.hidden(idx, cache), ensemble.hidden(idx))
    assert generate(ensemble, idx, 3 * BLOCK_SIZE).shape == (3, 4 * BLOCK_SIZE)


def test_more_than_a_window_is_refused() -> None:
    model = random_model(TransformerConfig(block_size=BLOCK_SIZE, n_layer=1, n_head=1, n_embd=4))
    cache = model.new_cache()
    model.hidden(fed(5), cache)
    with pytest.raises(ValueError, match="9 tokens were fed to a model whose block_size is 8"):
        model.hidden(fed(4), cache)


def test_a_bigram_needs_no_window() -> None:
    model = build_model(BigramConfig(block_size=2), V, seed=0).eval()
    assert len(list(stream_tokens(model, fed(1), SampleConfig(max_new_tokens=9)))) == 9


@pytest.mark.parametrize("config", [*combinations()[::4], BigramConfig()], ids=str)
def test_a_prompt_that_all_rows_share_is_read_once(config: ModelConfig) -> None:
    model, prompt = random_model(config), fed(5, rows=1)
    shared = generate(model, prompt.expand(3, -1), 2 * BLOCK_SIZE, seed=2)
    assert torch.equal(shared, generate(model, prompt.repeat(3, 1), 2 * BLOCK_SIZE, seed=2))
    ensemble = Ensemble([model, random_model(config, seed=1)], backend="torch")
    assert torch.equal(
        generate(ensemble, prompt.expand(3, -1), BLOCK_SIZE), generate(ensemble, prompt.repeat(3, 1), BLOCK_SIZE)
    )


# ------------------------------------------------------------------------------------------------- as a graph would be


@pytest.mark.parametrize("config", combinations(), ids=str)
@torch.no_grad()
def test_a_token_read_at_a_fixed_place_is_the_same_token(config: TransformerConfig) -> None:
    """What a CUDA graph would record is called again and again here; it sees only the tensors that it was made with."""
    model, recorded = random_model(config), 0
    idx = fed(2 * BLOCK_SIZE)

    def record(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        nonlocal recorded
        recorded += 1
        for _ in range(3):  # as the warm-up does
            step()
        return step

    cache = model.new_cache()
    assert isinstance(cache, TransformerCache)
    read = GraphedReader(cache, lambda tokens: model.logits(model.hidden(tokens, cache)[:, -1]), record)
    window = idx[:, :0]
    for t in range(idx.size(1)):
        new = idx[:, t : t + 1]
        if window.size(1) == BLOCK_SIZE:
            cache.clear()
            window, new = window[:, :0], torch.cat([window[:, -3:], new], 1)
        window = torch.cat([window, new], 1)
        wanted = model.logits(model.hidden(window)[:, -1])
        torch.testing.assert_close(read(new), wanted, rtol=1e-10, atol=1e-10)
        assert cache.length == window.size(1)
    assert recorded == 1


def test_only_what_is_on_a_gpu_is_recorded() -> None:
    model = random_model(combinations()[0])
    assert not isinstance(reader(model, model.new_cache()), GraphedReader)
