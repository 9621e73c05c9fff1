"""Stage split: data/tokens as a training and a validation part in data/splits, by position.

The one idea to know: a text too short for a variant's block_size is refused here, before any training.
"""

from pathlib import Path

from chargpt.command import user_errors
from chargpt.errors import CorpusError
from pipelines.tokenize import TOKENS

SPLITS = Path("data/splits")


def main() -> None:
    from chargpt.config import load_params
    from chargpt.data import read_tokens, require_size, split_tokens, write_splits
    from chargpt.tokenizers import load_tokenizer

    params = load_params()
    tokenizer = load_tokenizer(TOKENS / "tokenizer.json")
    splits = split_tokens(read_tokens(TOKENS / "ids.npy"), tokenizer, params.split.val_fraction)
    for variant in params.ablation.variants:
        try:
            require_size(splits, params.variants[variant].model.block_size)
        except CorpusError as error:
            raise CorpusError(f"variant {variant}: {error}") from None
    write_splits(SPLITS, splits)
    print(f"split: {len(splits.train):,} tokens to train, {len(splits.val):,} to validate → {SPLITS}")


if __name__ == "__main__":
    with user_errors():  # around the imports in main too: Ctrl-C while they load is an ordinary stop
        main()
