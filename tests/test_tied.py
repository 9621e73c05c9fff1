"""A table that embeds and is the head: one gradient, whoever asks for it."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chargpt.config import TransformerConfig
from chargpt.kernels import available_backends
from chargpt.models import Transformer
from chargpt.models.tied import embed_and_keep, pays

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


def dense_gradients(of: Transformer, B: int = 2) -> int:
    """Of the table's shape, made by the embedding in a step."""
    with torch.autograd.profiler.profile() as profile:
        of(*batch(B)).backward()
    return [event.name for event in profile.function_events].count("aten::embedding_dense_backward")


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
    assert dense_gradients(model()) == 0
    assert dense_gradients(model(), B=10) == 1  # 80 tokens
    assert dense_gradients(model(tied_head=False)) == 1


@pytest.mark.skipif("cpp" not in available_backends(), reason="all logits are made at once without it")
def test_the_rows_are_added_to_the_head_s_gradient_in_place() -> None:
    rows = 60_000
    tied, (idx, targets) = model(rows).float(), batch(120)  # 960 tokens, more than are worked on at once
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        tied(idx, targets).backward()
    assert "aten::add_" in [
        event.name for event in profile.function_events if event.input_shapes[:2] == [[rows, 8], [rows, 8]]
    ]


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
        x, again = embed_and_keep(table, idx)
        return torch.tanh(x @ again.t())

    assert torch.autograd.gradcheck(use, table)
    assert torch.autograd.gradgradcheck(use, table)
    out = use(table)
    directions = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that vmap over its operations is slow
        together = torch.autograd.grad(out, table, directions, retain_graph=True, is_grads_batched=True)[0]
    for direction, got in zip(directions, together, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(out, table, direction, retain_graph=True)[0])


def test_each_use_alone_has_its_gradient_and_it_is_dense() -> None:
    table = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    idx = torch.tensor([[0, 2, 2]])
    x, again = embed_and_keep(table, idx)
    (rows,) = torch.autograd.grad(x.square().sum(), table, retain_graph=True)
    assert torch.equal(rows, torch.autograd.grad(table[idx].square().sum(), table)[0])
    (head,) = torch.autograd.grad(again.square().sum(), table)
    assert torch.equal(head, 2 * table)
    x, again = embed_and_keep(table, idx)
    (expanded,) = torch.autograd.grad(x.square().sum() + again.sum(), table)
    torch.testing.assert_close(expanded, rows + 1)
    assert rows.layout == head.layout == expanded.layout == torch.strided


def test_narrow_ids_give_the_same_bits() -> None:
    tied, (idx, targets) = model(), batch()
    table = tied.token_embedding.weight
    wide, narrow = (torch.autograd.grad(tied(x, targets), table)[0] for x in (idx, idx.int()))
    assert torch.equal(wide, narrow)


def test_a_hook_sees_the_whole_gradient() -> None:
    tied, (idx, targets) = model(), batch()
    seen: list[Tensor] = []
    tied.token_embedding.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    tied(idx, targets).backward()
    assert torch.equal(seen[0], tied.token_embedding.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab_size", [V, 60_000])
def test_gradients_that_somebody_holds_stay_as_they_are(vocab_size: int) -> None:
    tied, (idx, targets) = model(vocab_size), batch(60 if vocab_size > V else 2)
    held: list[tuple[Tensor, Tensor]] = []
    loss = tied(idx, targets)
    nodes = [loss.grad_fn]
    for node in nodes:  # grows
        nodes += [one for one, _ in node.next_functions if one is not None and one not in nodes]

    def hold(*gradients: Any) -> None:
        held.extend((x, x.clone()) for some in gradients for x in some if x is not None and not x.is_sparse)

    for node in nodes:
        node.register_hook(hold)
    loss.backward()
    assert all(torch.equal(x, before) for x, before in held)


class Halved(Transformer):
    """A head of its own."""

    def _head(self) -> tuple[Tensor, Tensor | None]:
        return 0.5 * self.token_embedding.weight, None


class Squared(Transformer):
    def loss(self, h: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return super().loss(h, targets, reduction).square()


class Shifted(Transformer):
    def hidden(self, idx: Tensor, cache: Any = None) -> Tensor:
        return super().hidden(idx, cache) + 1


@pytest.mark.parametrize("kind", [Halved, Squared, Shifted])
def test_a_model_with_parts_of_its_own_is_asked_for_them(kind: type[Transformer]) -> None:
    tied, (idx, targets) = kind(model().config, V).double(), batch()
    found = tied(idx, targets)
    expected = tied.loss(tied.hidden(idx), targets)
    assert torch.equal(found, expected)
    table = tied.token_embedding.weight
    assert torch.equal(*(torch.autograd.grad(x, table)[0] for x in (found, expected)))


def test_an_object_with_parts_of_its_own_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tied, (idx, targets) = model(), batch()
    monkeypatch.setattr(tied, "loss", lambda h, targets, reduction="mean": h.sum())
    assert torch.equal(tied(idx, targets), tied.hidden(idx).sum())


@pytest.mark.parametrize(
    ("option", "value"), [("padding_idx", 3), ("padding_idx", 0), ("max_norm", 0.01), ("scale_grad_by_freq", True)]
)
def test_options_of_the_embedding_are_kept(option: str, value: Any) -> None:
    tied, (idx, targets) = model(), batch()
    idx[0] = 3
    setattr(tied.token_embedding, option, value)
    twin = copy.deepcopy(tied)
    found = torch.autograd.grad(tied(idx, targets), list(tied.parameters()))
    expected = torch.autograd.grad(twin.loss(twin.hidden(idx), targets), list(twin.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_the_embedding_are_called(kind: str) -> None:
    tied, (idx, targets) = model(), batch()
    assert pays(tied.token_embedding, idx)
    called: list[int] = []
    handle = getattr(tied.token_embedding, f"register_{kind}_hook")(lambda module, given, *_: called.append(len(given)))
    assert not pays(tied.token_embedding, idx)
    tied(idx, targets).backward()
    assert called == [1]
    handle.remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not pays(tied.token_embedding, idx)
    assert pays(tied.token_embedding, idx)


def test_other_embeddings_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    tied, (idx, targets) = model(), batch()
    expected = torch.autograd.grad(tied(idx, targets), tied.token_embedding.weight)[0]

    class Own(nn.Embedding):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given)

    own = Own(V, 8, dtype=torch.float64)
    own.weight = tied.token_embedding.weight
    assert not pays(own, idx)
    tied.token_embedding = own
    torch.testing.assert_close(torch.autograd.grad(tied(idx, targets), own.weight)[0], expected)
    tied = model()
    monkeypatch.setattr(tied.token_embedding, "forward", lambda given: 2 * tied.token_embedding.weight[given])
    assert not pays(tied.token_embedding, idx)
    assert torch.equal(tied(idx, targets), tied.loss(tied.hidden(idx), targets))


def test_where_autograd_is_not_to_be_seen_through_the_uses_stay_apart() -> None:
    tied, (idx, targets) = model(), batch()
    embedding = tied.token_embedding
    assert pays(embedding, idx)
    assert not pays(embedding, idx.repeat(4, 1))
    with torch.no_grad():
        assert not pays(embedding, idx)
    embedding.weight.requires_grad_(False)
    assert not pays(embedding, idx)
    embedding.weight.requires_grad_(True)
    expected = torch.autograd.grad(tied(idx, targets), embedding.weight)[0]
    parameters = {name: x.detach() for name, x in tied.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(tied, parameters, (idx, targets))  # type: ignore[no-any-return]

    found = torch.func.grad(loss)(parameters)["token_embedding.weight"]
    torch.testing.assert_close(found, expected)
    compiled = torch.compile(tied, backend="eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(idx, targets), embedding.weight)[0], expected)
