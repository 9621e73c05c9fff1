"""The random words are the published ones, and the dropout mask follows its written rule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chargpt.kernels.philox import dropout_keep_mask, philox_4x32, row_keep_mask

from .cases import naive_keep, naive_philox

# Known answers that the authors publish with their implementation (Random123, philox4x32 with 7 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]
SEED = 0x299F31D0A4093822  # both halves of the key are in use

word = st.integers(0, 2**32 - 1)


def tensors(*words: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(word) for word in words)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert naive_philox(counter, key) == expected  # type: ignore[arg-type]
    assert tuple(int(x) for x in philox_4x32(tensors(*counter), tensors(*key))) == expected  # type: ignore[arg-type]


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_is_the_scalar_generator(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    words = philox_4x32(tensors(*counter), tensors(*key))  # type: ignore[arg-type]
    assert tuple(int(x) for x in words) == naive_philox(counter, key)


@pytest.mark.parametrize(("T", "S", "p"), [(1, 1, 0.5), (5, 5, 0.2), (3, 10, 0.7), (9, 9, 1e-3)])
def test_mask_element_by_element(T: int, S: int, p: float) -> None:
    mask = dropout_keep_mask(torch.tensor(SEED), p, 3, T, S)
    assert mask.shape == (3, T, S)
    for bh in range(3):
        for i in range(T):
            for s in range(S):
                assert mask[bh, i, s].item() == naive_keep(SEED, p, bh, S - T + i, s)


def test_a_decision_depends_on_its_position_alone() -> None:
    seed = torch.tensor(SEED)
    whole = dropout_keep_mask(seed, 0.4, 6, 70, 70)
    assert torch.equal(dropout_keep_mask(seed, 0.4, 4, 33, 33), whole[:4, :33, :33])  # shorter sequence, smaller batch
    assert torch.equal(dropout_keep_mask(seed, 0.4, 6, 7, 70), whole[:, -7:])  # the last queries only


def test_neighbours_and_seeds_are_independent() -> None:
    masks = (
        torch.stack([dropout_keep_mask(torch.tensor(seed), 0.5, 4, 64, 64) for seed in (0, 1, 2**32)]).double() - 0.5
    )
    n = masks[0].numel()
    lagged = {
        "key": (masks[..., 1:] * masks[..., :-1]).mean(),
        "query": (masks[..., 1:, :] * masks[..., :-1, :]).mean(),
        "head": (masks[:, 1:] * masks[:, :-1]).mean(),
        "low half of the seed": (masks[0] * masks[1]).mean(),
        "high half of the seed": (masks[0] * masks[2]).mean(),
    }
    for name, correlation in lagged.items():
        assert abs(correlation.item()) < 5 * 0.25 / math.sqrt(n / 2), name  # five standard deviations


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_kept_is_one_minus_p(p: float) -> None:
    mask = dropout_keep_mask(torch.tensor(SEED), p, 8, 128, 128)
    assert abs(mask.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel())


@pytest.mark.parametrize(("rows", "channels", "p"), [(1, 1, 0.5), (4, 9, 0.2), (3, 64, 0.7)])
def test_the_mask_of_rows_element_by_element(rows: int, channels: int, p: float) -> None:
    mask = row_keep_mask(torch.tensor(SEED), p, rows, channels)
    wanted = [[naive_keep(SEED, p, 0, i, j) for j in range(channels)] for i in range(rows)]
    assert mask.tolist() == wanted


def test_rows_channels_and_seeds_are_independent() -> None:
    masks = torch.stack([row_keep_mask(torch.tensor(seed), 0.5, 512, 384) for seed in (0, 1, 2**32)]).double() - 0.5
    n = masks[0].numel()
    lagged = {
        "channel": (masks[..., 1:] * masks[..., :-1]).mean(),
        "group of eight channels": (masks[..., 8:] * masks[..., :-8]).mean(),
        "row": (masks[..., 1:, :] * masks[..., :-1, :]).mean(),
        "low half of the seed": (masks[0] * masks[1]).mean(),
        "high half of the seed": (masks[0] * masks[2]).mean(),
    }
    for name, correlation in lagged.items():
        assert abs(correlation.item()) < 5 * 0.25 / math.sqrt(n), name  # five standard deviations


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_channels_kept_is_one_minus_p(p: float) -> None:
    mask = row_keep_mask(torch.tensor(SEED), p, 512, 384)
    assert abs(mask.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel())
    by_column = mask.double().mean(0) - (1 - p)  # (384,)
    assert by_column.abs().max().item() < 5 * math.sqrt(p * (1 - p) / 512)
