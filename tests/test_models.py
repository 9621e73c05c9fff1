"""Models: every combination of parts trains and never sees the future; each part against an independent computation."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chargpt.config import BigramConfig, ModelConfig, TransformerConfig
from chargpt.data import Splits, random_batch
from chargpt.kernels import qkv_heads
from chargpt.models import Ensemble, LanguageModel, Transformer, build_model, parameter_count, transformer

V = 11  # symbols


def tiny(**parts: Any) -> TransformerConfig:
    return TransformerConfig(**{"block_size": 7, "n_layer": 2, "n_head": 4, "n_embd": 16} | parts)


def batch(length: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(V, (3, length), generator=generator) for _ in range(2))  # type: ignore[return-value]


def shaken(config: ModelConfig, vocab_size: int = V) -> nn.Module:
    """A float64 model in evaluation mode whose every parameter is random, gains, biases and value embeddings too."""
    model = build_model(config, vocab_size, seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        {"dropout": 0.2, "bias": True},
        {"norm": "rmsnorm", "position": "rotary", "mlp": "relu2", "qk_norm": True, "value_embeddings": True},
        {"residual": False, "mlp": "none", "norm": "none", "dropout": 0.5},
    ],
    ids=["gpt", "modern", "attention alone"],
)
def test_computed_again_or_kept_the_bits_are_the_same(parts: dict[str, Any], bf16: bool) -> None:
    """And of what is kept for the backward, most is not."""
    idx, targets = batch()
    found = []
    for recompute in (False, True):
        model = build_model(tiny(n_layer=6, **parts), V, seed=1)
        model.recompute = recompute
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()  # noqa: B023
            return x

        torch.manual_seed(2)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=bf16):
            loss = model(idx, targets)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        size = sum(size for place, size in kept.items() if place not in weights)
        found.append((loss, gradients, torch.get_rng_state(), size))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(x, y) for x, y in zip(found[0][1], found[1][1], strict=True))
    assert torch.equal(found[0][2], found[1][2])  # what comes next draws the same
    assert found[1][3] < found[0][3] / 2


def test_what_is_generated_or_scored_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(transformer, "checkpoint", refuse)
    model = build_model(tiny(), V, seed=1)
    model.recompute = True
    idx, targets = batch()
    model.hidden(idx, model.new_cache())
    with torch.no_grad():
        model(idx, targets)
    with pytest.raises(AssertionError):
        model(idx, targets)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    torch.func.grad(lambda given: torch.func.functional_call(model, given, (idx, targets)))(weights)


CHOICES: dict[str, tuple[Any, ...]] = {
    "position": ("none", "learned", "rotary"),
    "norm": ("none", "layernorm", "rmsnorm"),
    "mlp": ("none", "relu", "gelu", "relu2", "swiglu"),
    "residual": (True, False),
    "n_kv_head": (None, 1, 2),
    "qk_norm": (False, True),
    "tied_head": (True, False),
    "logit_softcap": (None, 5.0),
    "value_embeddings": (False, True),
    "bigram_embeddings": (False, True),
    "bias": (False, True),
    "init": ("gpt2", "torch"),
}


def every_pair_of_choices() -> list[dict[str, Any]]:
    """Few configurations in which any two choices of any two parts meet: greedy, the same list each time."""
    names = list(CHOICES)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(CHOICES[names[a]]))
        for j in range(len(CHOICES[names[b]]))
    }
    generator = torch.Generator().manual_seed(0)
    chosen = []
    while missing:
        candidates = [
            tuple(int(torch.randint(len(options), (), generator=generator)) for options in CHOICES.values())
            for _ in range(40)
        ]
        best = max(candidates, key=lambda row: len(missing & set(itertools.combinations(enumerate(row), 2))))
        missing -= set(itertools.combinations(enumerate(best), 2))
        parts = {name: CHOICES[name][i] for name, i in zip(names, best, strict=True)}
        chosen.append(parts if parts["residual"] else parts | {"mlp_width": 1.0})
    return chosen


def logits_of(model: LanguageModel, idx: torch.Tensor) -> torch.Tensor:  # (B, T, V)
    return model.logits(model.hidden(idx))


PAIRS = every_pair_of_choices()
COMBINATIONS: list[ModelConfig] = [BigramConfig(block_size=7), *(tiny(**parts) for parts in PAIRS)]
everywhere = pytest.mark.parametrize("config", COMBINATIONS, ids=[str(i) for i in range(len(COMBINATIONS))])


# -------------------------------------------------------------------------------------------------- the lecture's facts


def test_the_lectures_bigram_table_has_the_lectures_loss(shakespeare_splits: Splits) -> None:
    torch.manual_seed(1337)
    x, y = random_batch(shakespeare_splits.train, batch_size=4, block_size=8, generator=None)
    model = build_model(BigramConfig(), vocab_size=65, seed=1337)
    assert logits_of(model, x).shape == (4, 8, 65)
    assert model(x, y).item() == pytest.approx(4.8786, abs=5e-5)


def test_a_model_that_knows_nothing_guesses_uniformly(shakespeare_splits: Splits) -> None:
    x, y = random_batch(shakespeare_splits.train, 4, 8, torch.Generator().manual_seed(0))
    for config in (BigramConfig(), TransformerConfig(block_size=8)):
        model = build_model(config, vocab_size=65, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert model(x, y).item() == pytest.approx(4.1744, abs=5e-5) == pytest.approx(math.log(65), abs=5e-5)
    # GPT-2's initialisation starts close to that.
    fresh = build_model(TransformerConfig(block_size=8), vocab_size=65, seed=0)(x, y).item()
    assert fresh == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize(
    "config",
    [
        tiny(n_layer=1, n_head=1, n_embd=32, block_size=8, residual=False, norm="none", mlp="none", tied_head=False),
        tiny(n_layer=1, n_head=4, n_embd=32, block_size=8, residual=False, norm="none", mlp="none", tied_head=False),
        tiny(n_layer=1, n_embd=32, residual=False, norm="none", mlp="relu", mlp_width=1.0, tied_head=False),
        tiny(n_layer=3, n_embd=32, norm="none", mlp="relu", tied_head=False, bias=True),
        tiny(n_layer=3, n_embd=32, norm="layernorm", mlp="relu", tied_head=False, bias=True),
    ],
    ids=["one head", "four heads", "feed-forward", "residual", "layer norm"],
)
def test_the_lectures_steps_learn_one_batch(config: TransformerConfig) -> None:
    model = build_model(config, V, seed=0)
    x, y = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(x, y).item()
    for _ in range(60):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
    assert model(x, y).item() < first - 0.3


def test_one_head_of_the_lecture_has_its_parameters() -> None:
    config = tiny(
        n_layer=1, n_head=1, n_embd=32, block_size=8, residual=False, norm="none", mlp="none", tied_head=False
    )
    # Two embeddings, key, query and value without biases, and the head; the lecture's head has a bias of 65 more.
    assert parameter_count(build_model(config, 65, 0)) == 65 * 32 + 8 * 32 + 3 * 32 * 32 + 32 * 65


# ----------------------------------------------------------------------------------------------------- all combinations


def test_the_combinations_hold_every_pair_of_choices() -> None:
    for (a, options), (b, others) in itertools.combinations(CHOICES.items(), 2):
        met = {(parts[a], parts[b]) for parts in PAIRS}
        assert met == set(itertools.product(options, others))


@everywhere
def test_every_combination_trains_all_of_its_parameters(config: ModelConfig) -> None:
    model = shaken(config).train()
    x, y = batch()
    loss = model(x, y)
    assert loss.shape == ()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@everywhere
def test_every_combination_starts_finite_in_float32(config: ModelConfig) -> None:
    model = build_model(config, V, seed=0)
    x, y = batch()
    loss = model(x, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@everywhere
def test_the_future_never_changes_the_past(config: ModelConfig) -> None:
    model = shaken(config)
    x, _ = batch()
    logits = logits_of(model, x)
    for t in range(1, 7):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        assert torch.equal(logits_of(model, changed)[:, :t], logits[:, :t])
        assert not torch.equal(logits_of(model, changed)[:, t], logits[:, t])


@everywhere
def test_the_past_reaches_every_later_token_of_a_transformer_and_none_of_a_bigram(config: ModelConfig) -> None:
    model = shaken(config)
    x, _ = batch()
    changed = x.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    same = (logits_of(model, changed) == logits_of(model, x)).all(-1)[:, 1:]
    assert same.all() if isinstance(config, BigramConfig) else not same.any()


@everywhere
def test_the_loss_is_the_cross_entropy_of_the_logits(config: ModelConfig) -> None:
    model = shaken(config)
    x, y = batch()
    h = model.hidden(x)
    expected = F.cross_entropy(model.logits(h).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    torch.testing.assert_close(model.loss(h, y, "none"), expected)
    torch.testing.assert_close(model.loss(h, y, "sum"), expected.sum())
    torch.testing.assert_close(model.loss(h, y), expected.mean())
    assert torch.equal(model(x, y), model.loss(h, y))
    torch.testing.assert_close(model.loss(h[:, -1], y[:, -1], "none"), expected[:, -1])


@everywhere
def test_rows_of_a_batch_do_not_meet(config: ModelConfig) -> None:
    model = shaken(config)
    x, _ = batch()
    together = logits_of(model, x)
    alone = torch.cat([logits_of(model, row[None]) for row in x])
    torch.testing.assert_close(alone, together, atol=1e-10, rtol=1e-10)


@everywhere
def test_weights_depend_on_the_seed_alone_and_leave_torchs_generator_as_it_was(config: ModelConfig) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(config, V, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = build_model(config, V, seed=3).state_dict()
    other = build_model(config, V, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@everywhere
def test_short_texts_are_welcome_and_long_ones_refused(config: ModelConfig) -> None:
    model = shaken(config)
    assert logits_of(model, batch(length=1)[0]).shape == (3, 1, V)
    if isinstance(config, TransformerConfig):
        with pytest.raises(ValueError, match="8 tokens were fed to a model whose block_size is 7"):
            model.hidden(batch(length=8)[0])


# ----------------------------------------------------------------------------------------------------------- parameters


def test_nanogpts_cpu_configuration_has_804_096_parameters() -> None:
    model = build_model(TransformerConfig(), vocab_size=65, seed=0)
    V, T, C, L = 65, 64, 128, 4
    per_block = 3 * C * C + C * C + 4 * C * C + 4 * C * C + 2 * C  # qkv, projection, two of the MLP, two gains
    assert parameter_count(model) == V * C + T * C + L * per_block + C == 804_096
    assert parameter_count(model) - T * C == 795_904  # nanoGPT prints 0.80M, without the positions


def test_a_tied_head_is_the_embedding_and_counts_once() -> None:
    tied, untied = (build_model(tiny(tied_head=tied), V, seed=0) for tied in (True, False))
    assert parameter_count(untied) - parameter_count(tied) == V * 16
    assert "head.weight" not in tied.state_dict()
    zeros = torch.zeros(1, 7, dtype=torch.long)
    tied(zeros, zeros).backward()
    assert (tied.token_embedding.weight.grad[5] != 0).any()  # as a row of the head: token 5 was no input
    untied(zeros, zeros).backward()
    assert (untied.token_embedding.weight.grad[5] == 0).all()


def test_initial_weights_have_gpt2s_widths() -> None:
    config = TransformerConfig(
        n_layer=3, n_embd=256, bias=True, tied_head=False, value_embeddings=True, bigram_embeddings=True
    )
    model = build_model(config, vocab_size=300, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "value_embedding" in name or "bigram_embedding" in name:
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            wanted = 0.02 / math.sqrt(6) if "projection" in name else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.03), name
            assert parameter.mean().item() == pytest.approx(0, abs=wanted / 30), name


# ----------------------------------------------------------------------------------------------------- part by part


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0])
def test_a_softcap_bounds_the_logits_by_its_formula(cap: float) -> None:
    free, capped = shaken(tiny()), shaken(tiny(logit_softcap=cap))
    x, _ = batch()
    logits = 50 * logits_of(free, x)
    with torch.no_grad():
        for model in (free, capped):
            model.norm.weight *= 50
    torch.testing.assert_close(logits_of(free, x), logits)
    assert logits_of(free, x).abs().max() > cap
    assert logits_of(capped, x).abs().max() <= cap
    torch.testing.assert_close(logits_of(capped, x), cap * torch.tanh(logits / cap))


@pytest.mark.parametrize("init", ["gpt2", "torch"])
@pytest.mark.parametrize("part", ["value_embeddings", "bigram_embeddings"])
def test_added_embeddings_begin_as_the_same_seed_without_them(part: str, init: str) -> None:
    without, with_them = (build_model(tiny(init=init, **{part: on}), V, seed=0) for on in (False, True))
    assert parameter_count(with_them) > parameter_count(without)
    x, _ = batch()
    assert torch.equal(logits_of(without, x), logits_of(with_them, x))


def test_models_of_one_seed_share_the_weights_of_the_parts_they_share() -> None:
    plain = build_model(tiny(), V, seed=0).state_dict()
    other = build_model(tiny(position="rotary", mlp="relu2", n_layer=2, qk_norm=True, tied_head=False), V, seed=0)
    shared = plain.keys() & other.state_dict().keys()
    assert {"token_embedding.weight", "blocks.1.attention.qkv.weight", "blocks.1.mlp.projection.weight"} <= shared
    assert all(torch.equal(plain[name], other.state_dict()[name]) for name in shared)
    assert not torch.equal(plain["blocks.0.mlp.expand.weight"], plain["blocks.1.mlp.expand.weight"])


def test_torchs_init_is_that_of_torchs_layers() -> None:
    model = build_model(TransformerConfig(n_layer=1, n_embd=256, tied_head=False, init="torch"), 300, seed=0)
    assert model.token_embedding.weight.std().item() == pytest.approx(1, rel=0.03)
    for layer in (model.blocks[0].attention.qkv, model.blocks[0].mlp.projection, model.head):
        bound = 1 / math.sqrt(layer.in_features)  # as nn.Linear's own: kaiming_uniform_ with a = √5
        assert 0.99 * bound < layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize(("vocab_size", "rows"), [(11, 121), (256, 2**16), (300, 2**16)])
def test_bigram_embeddings_have_a_row_for_each_pair_or_share_evenly(vocab_size: int, rows: int) -> None:
    model = build_model(tiny(bigram_embeddings=True), vocab_size, seed=0)
    first, second = torch.meshgrid(torch.arange(vocab_size), torch.arange(vocab_size), indexing="ij")
    pairs = torch.stack([first.flatten(), second.flatten()], dim=1)  # (V², 2): every pair once
    counts = model._bigrams(pairs)[:, 1].bincount(minlength=rows)
    assert model.bigram_embedding.weight.shape == (rows, 16)
    assert counts.numel() == rows
    assert counts.max() <= (1 if rows == vocab_size**2 else 3 * vocab_size**2 / rows)
    idx = torch.tensor([[3, 5, 5]])
    same = model._bigrams(torch.tensor([[3, 3, 5]]))[0]
    assert torch.equal(model._bigrams(idx)[0, 1], same[2])  # (3, 5) wherever it stands
    assert torch.equal(model._bigrams(idx)[0, 0], same[1])  # the first token stands for both


def test_pairs_of_many_symbols_have_the_rows_that_saved_models_have() -> None:
    """Spread by Knuth's multiplication: (0, 1) → 2654435761 mod 2^16, and so on."""
    model = build_model(tiny(bigram_embeddings=True), 300, seed=0)
    rows = model._bigrams(torch.tensor([[0, 1], [1, 0], [299, 298]]))[:, 1]
    products = [n * 2654435761 for n in (1, 300, 299 * 300 + 298)]
    assert rows.tolist() == [31153, 39788, 12078] == [product % 2**32 % 2**16 for product in products]


def test_value_embeddings_add_a_row_of_their_table_to_the_values() -> None:
    # One layer, one token: attention returns the value itself, so the table's row passes straight through.
    model = shaken(tiny(n_layer=1, mlp="none", norm="none", residual=False, value_embeddings=True, tied_head=False))
    idx = torch.tensor([[3]])
    x = model.token_embedding.weight[3] + model.position_embedding.weight[0]
    value = model.blocks[0].attention.qkv.weight[-16:] @ x + model.blocks[0].attention.value_embedding.weight[3]
    torch.testing.assert_close(logits_of(model, idx)[0, 0], model.head.weight @ value)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Queries x (B, H, T, D) as a model with rotary positions and one such head turns them."""
    model = build_model(tiny(position="rotary", block_size=32, n_head=1, n_embd=x.size(-1)), V, 0)
    qkv = torch.cat([x, x, x], dim=-1).flatten(0, 1)  # one head each
    cos, sin = model.blocks[0].attention.rotary.angles()
    q, k, _ = qkv_heads(qkv, None, cos, sin, n_head=1, n_kv_head=1, qk_norm=False, impl="torch")
    assert torch.equal(q, k)
    return q.view(x.shape)


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64)
    scores = rotated(q.expand(1, 1, 32, 4)) @ rotated(k.expand(1, 1, 32, 4)).mT  # (1, 1, 32, 32)
    for distance in range(-31, 32):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)  # float32 angles
    torch.testing.assert_close(rotated(q)[..., 0, :], q[..., 0, :])  # position 0 turns nothing
    assert scores[0, 0, 0].std() > 1e-3


def test_rotary_is_multiplication_by_a_unit_complex_number() -> None:
    x = torch.randn(2, 3, 32, 8)
    turned = rotated(x)
    z = torch.complex(x[..., :4], x[..., 4:])
    angle = torch.arange(32)[:, None] * 10000.0 ** (-2 * torch.arange(4) / 8)
    wanted = z * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned, torch.cat([wanted.real, wanted.imag], -1), atol=1e-5, rtol=1e-5)


def test_without_positions_the_order_of_the_past_does_not_matter_and_with_them_it_does() -> None:
    x, _ = batch()
    shuffled = torch.cat([x[:, [2, 0, 3, 1, 5, 4]], x[:, 6:]], dim=1)
    # One layer: in a second one the earlier tokens would have seen different pasts.
    for position in ("none", "learned", "rotary"):
        model = shaken(tiny(n_layer=1, position=position))
        same = torch.allclose(logits_of(model, x)[:, -1], logits_of(model, shuffled)[:, -1], atol=1e-10)
        assert same == (position == "none")


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize("parts", [{}, {"qk_norm": True, "position": "rotary", "value_embeddings": True, "bias": True}])
def test_grouped_heads_are_repeated_heads(n_kv_head: int, parts: dict[str, Any]) -> None:
    grouped, full = shaken(tiny(n_kv_head=n_kv_head, **parts)), shaken(tiny(**parts))
    state = {}
    for name, tensor in grouped.state_dict().items():
        if ".qkv." in name:  # rows: 4 query heads of 4 channels, then the key heads, then the value heads
            q, k, v = tensor.split([16, 4 * n_kv_head, 4 * n_kv_head])
            tensor = torch.cat(
                [q, *(x.unflatten(0, (-1, 4)).repeat_interleave(4 // n_kv_head, 0).flatten(0, 1) for x in (k, v))]
            )
        elif "value_embedding" in name:
            tensor = tensor.unflatten(1, (-1, 4)).repeat_interleave(4 // n_kv_head, 1).flatten(1)
        state[name] = tensor
    full.load_state_dict(state)
    x, _ = batch()
    torch.testing.assert_close(logits_of(grouped, x), logits_of(full, x), atol=1e-10, rtol=1e-10)


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant() -> None:
    model = shaken(tiny(qk_norm=True, n_layer=1))
    x, _ = batch()
    before = logits_of(model, x)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[:16] *= 100.0
        model.blocks[0].attention.qkv.weight[16:32] *= 0.5
    torch.testing.assert_close(logits_of(model, x), before, atol=1e-4, rtol=1e-4)  # RMSNorm's ε


@pytest.mark.parametrize("mlp", ["relu", "gelu", "relu2", "swiglu"])
def test_each_mlp_is_its_formula(mlp: str) -> None:
    layer = shaken(tiny(mlp=mlp, bias=True, mlp_width=2.5)).blocks[0].mlp
    x = torch.randn(5, 16, dtype=torch.float64)
    h = x @ layer.expand.weight.T + layer.expand.bias
    match mlp:
        case "relu":
            h = h.clamp(min=0)
        case "relu2":
            h = h.clamp(min=0) ** 2
        case "gelu":
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        case "swiglu":
            h = h[:, :40] / (1 + torch.exp(-h[:, :40])) * h[:, 40:]
    assert h.shape == (5, 40)
    torch.testing.assert_close(layer(x), h @ layer.projection.weight.T + layer.projection.bias)


def test_dropout_acts_in_training_alone_and_comes_from_torchs_generator() -> None:
    model = build_model(tiny(dropout=0.5), V, seed=0)
    x, _ = batch()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(logits_of(model.train(), x))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.eval()
    assert torch.equal(logits_of(model, x), logits_of(model, x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_dropout_stands_at_every_site(position: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the embeddings, in attention, and where each branch joins the stream."""
    joined, attended = [], []

    def join(x: torch.Tensor | None, y: torch.Tensor, *gains: torch.Tensor, dropout_p: float, **rest: str) -> Any:
        joined.append((x is None, tuple(y.shape), dropout_p))
        return y, y

    def attend(q: torch.Tensor, *kv: torch.Tensor, dropout_p: float, impl: str) -> torch.Tensor:
        attended.append(dropout_p)
        return q

    def attend_packed(qkv: torch.Tensor, n_head: int, n_kv_head: int, dropout_p: float, impl: str) -> torch.Tensor:
        attended.append(dropout_p)
        return qkv[..., :16]

    monkeypatch.setattr(transformer, "packed_causal_attention", attend_packed)
    monkeypatch.setattr(transformer, "add_norm", join)
    monkeypatch.setattr(transformer, "causal_attention", attend)
    model = build_model(tiny(dropout=0.3, position=position), V, seed=0).train(training)
    model.hidden(batch()[0])
    p = 0.3 if training else 0.0
    assert joined == [(i == 0, (3, 7, 16), p) for i in range(5)]
    assert attended == [p] * 2


def test_a_model_with_dropout_computes_the_same_on_every_backend() -> None:
    """The masks too: they are functions of a seed, which torch's generator draws."""
    x, y = batch()
    found = []
    for backend in ("torch", "auto"):
        model = build_model(tiny(dropout=0.3), V, seed=0, backend=backend).double()
        torch.manual_seed(3)
        loss = model(x, y)
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ a plain twin


def plain_gpt(state: dict[str, torch.Tensor], idx: torch.Tensor, n_layer: int, n_head: int) -> torch.Tensor:
    """GPT-2 as loops over batch, head and query, straight from its equations: logits (B, T, V)."""

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance = x.mean(), x.var(correction=0)
        return (x - mean) / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    rows = []
    for tokens in idx.tolist():
        stream = [
            state["token_embedding.weight"][token] + state["position_embedding.weight"][t]
            for t, token in enumerate(tokens)
        ]
        for block in (f"blocks.{i}" for i in range(n_layer)):
            qkv = [linear(layer_norm(x, f"{block}.attention_norm"), f"{block}.attention.qkv").chunk(3) for x in stream]
            for t in range(len(tokens)):
                heads = []
                for head in range(n_head):
                    q = qkv[t][0].chunk(n_head)[head]
                    k, v = ([qkv[s][part].chunk(n_head)[head] for s in range(t + 1)] for part in (1, 2))
                    weights = torch.stack([q @ key / math.sqrt(len(q)) for key in k]).softmax(0)
                    heads.append(sum(w * value for w, value in zip(weights, v, strict=True)))
                stream[t] = stream[t] + linear(torch.cat(heads), f"{block}.attention.projection")
                h = linear(layer_norm(stream[t], f"{block}.mlp_norm"), f"{block}.mlp.expand")
                h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
                stream[t] = stream[t] + linear(h, f"{block}.mlp.projection")
        rows.append(torch.stack([state["token_embedding.weight"] @ layer_norm(x, "norm") for x in stream]))
    return torch.stack(rows)


def test_the_defaults_are_gpt2_as_written_from_its_equations() -> None:
    model = shaken(tiny(bias=True))
    x, y = batch()
    parameters = dict(model.named_parameters())
    wanted = plain_gpt(parameters, x, n_layer=2, n_head=4)
    logits, loss = logits_of(model, x), model(x, y)
    torch.testing.assert_close(logits, wanted, atol=1e-11, rtol=1e-11)
    wanted_loss = -wanted.log_softmax(-1).gather(-1, y[..., None]).mean()
    ours = torch.autograd.grad(loss, list(parameters.values()))
    theirs = torch.autograd.grad(wanted_loss, list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9, msg=name)


@pytest.mark.parametrize("parts", PAIRS[:4], ids=[str(i) for i in range(4)])
def test_gradients_are_those_of_finite_differences(parts: dict[str, Any]) -> None:
    model = shaken(tiny(**parts))
    x, y = batch()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(x, y), parameters)
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    step, losses = 1e-7, []  # short, so that no ReLU is likely to lie between the two points
    with torch.no_grad():
        for sign in (1, -2):  # to +step, then to −step
            for parameter, along in zip(parameters, direction, strict=True):
                parameter += sign * step * along
            losses.append(model(x, y).item())
    slope = sum((g * along).sum().item() for g, along in zip(gradients, direction, strict=True))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_torch_compile_takes_a_transformer_as_one_graph() -> None:
    config = tiny(n_layer=1, position="rotary", norm="rmsnorm", mlp="swiglu", n_kv_head=2, logit_softcap=10.0)
    model = build_model(config, V, seed=0)
    x, y = batch()
    expected = model(x, y)
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True)(x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_a_model_is_a_transformer_or_a_bigram_as_its_config_says() -> None:
    assert isinstance(build_model(TransformerConfig(), V, 0), Transformer)
    assert list(build_model(BigramConfig(), V, 0).state_dict()) == ["token_table.weight"]


# ------------------------------------------------------------------------------------------------ hidden states, logits


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_logits_of_one_position_are_those_of_all(softcap: float | None) -> None:
    """Of every kind of model, an ensemble of unequal ones included."""
    narrow = TransformerConfig(block_size=6, n_layer=1, n_head=1, n_embd=4, tied_head=False, bias=True)
    wide = TransformerConfig(block_size=6, n_layer=1, n_head=2, n_embd=8, logit_softcap=softcap)
    members = [build_model(config, 7, seed=1).double().eval() for config in (BigramConfig(), narrow, wide)]
    idx = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(1))
    for model in (*members, Ensemble(members)):
        h = model.hidden(idx)
        assert h.shape[:2] == idx.shape
        torch.testing.assert_close(model.logits(h[:, -1]), logits_of(model, idx)[:, -1])
    probabilities = torch.stack([logits_of(member, idx).softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(
        logits_of(Ensemble(members), idx).softmax(-1).double(), probabilities, rtol=1e-5, atol=1e-7
    )


def test_a_quantised_model_generates() -> None:
    """torch replaces linear layers by others, whose weights are no tensors."""
    model = build_model(tiny(tied_head=False, n_embd=32), V, seed=0).eval()
    x, _ = batch()
    expected = logits_of(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out of torch
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert (logits_of(quantised, x) - expected).abs().max() < 0.1 * expected.abs().max()
