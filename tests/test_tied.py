"""A table that embeds and is the head: one gradient, whoever asks for it."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chargpt.config import TransformerConfig
from chargpt.models import Transformer
from chargpt.models.tied import Tie, TiedEmbedding, _EmbedAndKeep

V = 50  # rows; more than the tokens of a batch


def model(vocab_size: int = V, **parts: Any) -> Transformer:
    torch.manual_seed(1)
    config = TransformerConfig(**{"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8} | parts)
    return Transformer(config, vocab_size).double()


def batch(B: int = 2, T: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens, one of them twice, and their targets."""
    idx, targets = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(2))
    idx[0, 1] = idx[0, 0]
    return idx, targets


def sums(of: Transformer, B: int = 2) -> list[str]:
    """What torch was asked for in a step with results of the table's shape, beyond what the head needs."""
    idx, targets = batch(B)
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        of(idx, targets).backward()
    names = {"aten::embedding_dense_backward", "aten::index_add_", "aten::add", "aten::add_"}
    table = list(of.token_embedding.weight.shape)
    return [
        event.name
        for event in profile.function_events
        if event.name in names and (event.input_shapes[:1] == [table] or event.name.endswith("dense_backward"))
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_gradient_is_that_of_the_two_uses_apart(backend: str, recompute: bool, reduction: str) -> None:
    tied, (idx, targets) = model(logit_softcap=5.0), batch()
    tied.backend, tied.recompute = backend, recompute
    apart = torch.autograd.grad(tied.loss(tied.hidden(idx), targets, reduction), list(tied.parameters()))
    for _ in range(2):  # adds up over batches
        tied(idx, targets, reduction).backward()
    for parameter, expected in zip(tied.parameters(), apart, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * expected, rtol=1e-12, atol=1e-14)


def test_no_second_table_is_made_where_few_tokens_are_read() -> None:
    assert sums(model()) == ["aten::index_add_"]
    assert "aten::embedding_dense_backward" in sums(model(), B=10)  # 80 tokens
    assert "aten::index_add_" not in sums(model(tied_head=False))


def test_a_loss_without_reduction_and_a_second_walk() -> None:
    tied, (idx, targets) = model(), batch()
    table = tied.token_embedding.weight
    losses = tied(idx, targets, "none")
    first = torch.autograd.grad(losses.sum(), table, retain_graph=True)[0].clone()
    second = torch.autograd.grad(losses.sum(), table)[0]
    apart = torch.autograd.grad(tied.loss(tied.hidden(idx), targets, "sum"), table)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, apart, rtol=1e-12, atol=1e-14)


def test_second_derivatives_and_batched_ones() -> None:
    idx = torch.tensor([[0, 2, 2]])
    table = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def use(table: Tensor) -> Tensor:
        x, again = _EmbedAndKeep.apply(table, idx)  # type: ignore[no-untyped-call]
        return torch.tanh(x @ again.t())  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(use, table)
    assert torch.autograd.gradgradcheck(use, table)
    out = use(table)
    directions = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that vmap over its operations is slow
        together = torch.autograd.grad(out, table, directions, retain_graph=True, is_grads_batched=True)[0]
    for direction, got in zip(directions, together, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(out, table, direction, retain_graph=True)[0])


def test_each_use_alone_has_its_gradient() -> None:
    tied, (idx, targets) = model(), batch()
    table = tied.token_embedding.weight
    for tie in (None, Tie()):  # nobody asks for the head
        tied.hidden(idx, tie=tie).square().sum().backward()  # type: ignore[no-untyped-call]
    whole, half = table.grad, torch.autograd.grad(tied.hidden(idx).square().sum(), table)[0]
    assert whole is not None
    torch.testing.assert_close(whole, 2 * half)
    tie = Tie()
    h = tied.hidden(idx, tie=tie).detach()
    with_tie = torch.autograd.grad(tied.loss(h, targets, "mean", tie), table)[0]
    torch.testing.assert_close(with_tie, torch.autograd.grad(tied.loss(h, targets), table)[0])


def test_hooks_see_the_embedding_and_the_whole_gradient() -> None:
    tied, (idx, targets) = model(), batch()
    seen: dict[str, Any] = {}
    tied.token_embedding.register_forward_hook(lambda module, given, x: seen.update(x=x))
    tied.token_embedding.weight.register_hook(lambda gradient: seen.update(gradient=gradient.clone()))
    tied(idx, targets).backward()
    assert torch.equal(seen["x"], tied.token_embedding.weight[idx])
    assert torch.equal(seen["gradient"], tied.token_embedding.weight.grad)


def test_who_cannot_add_in_place_takes_the_two_uses_apart() -> None:
    tied, (idx, targets) = model(), batch()
    embedding = tied.token_embedding
    assert isinstance(embedding, TiedEmbedding)
    assert embedding.pays(idx)
    assert not embedding.pays(idx.repeat(4, 1))
    with torch.no_grad():
        assert not embedding.pays(idx)
    embedding.weight.requires_grad_(False)
    assert not embedding.pays(idx)
    embedding.weight.requires_grad_(True)
    expected = torch.autograd.grad(tied(idx, targets), embedding.weight)[0]
    parameters = {name: x.detach() for name, x in tied.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(tied, parameters, (idx, targets))  # type: ignore[no-any-return]

    found = torch.func.grad(loss)(parameters)["token_embedding.weight"]
    torch.testing.assert_close(found, expected)
    compiled = torch.compile(tied, backend="eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(idx, targets), embedding.weight)[0], expected)
    plain = nn.Embedding(V, 8, dtype=torch.float64)
    plain.weight = embedding.weight
    tied.token_embedding = plain  # type: ignore[assignment]
    torch.testing.assert_close(torch.autograd.grad(tied(idx, targets), plain.weight)[0], expected)
