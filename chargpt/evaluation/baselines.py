"""Guesses that only count: the scale for a model's loss."""

import math

import numpy as np

from chargpt.data import Splits

COUNTED_TOKENS = 5_000_000  # in pairs: bounds time and memory


def guess_losses(splits: Splits) -> dict[str, float]:
    """Mean loss on the validation part of guesses that only count, by what they count: the scale for a model's loss.

    Pairs are smoothed by how many different tokens follow each (Witten and Bell 1991, method C), and counted on the
    last COUNTED_TOKENS of the training part.
    """
    V = splits.tokenizer.vocab_size
    train = splits.train[-COUNTED_TOKENS:].astype(np.int64)
    val = splits.val_with_context.astype(np.int64)
    single = (np.bincount(train, minlength=V) + 1) / (len(train) + V)  # (V,)
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    seen = np.bincount(pairs // V, weights=counts, minlength=V)  # (V,) pairs that begin with each
    followers = np.bincount(pairs // V, minlength=V)  # (V,) different ones among them
    wanted = val[:-1] * V + val[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    first, second = val[:-1], val[1:]
    backed_off = followers[first] * single[second]
    probability = np.where(
        seen[first] > 0, (count + backed_off) / np.maximum(seen[first] + followers[first], 1), single[second]
    )
    return {
        f"with all {V:,} symbols equally likely": math.log(V),
        "by how often each occurs": float(-np.log(single[val[1:]]).mean()),
        "by how often each follows the one before": float(-np.log(probability).mean()),
    }
