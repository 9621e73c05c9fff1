"""Stage tokenize: data/raw/corpus.txt as token ids, data/tokens/ids.npy, and the tokenizer that made them.

Run it as `python -m pipelines.tokenize`: run as a script, it would stand in for the standard library's `tokenize`.
"""

from pathlib import Path

from chargpt.command import user_errors
from pipelines.download import CORPUS

TOKENS = Path("data/tokens")


def main() -> None:
    from chargpt.config import load_params
    from chargpt.data import write_tokens
    from chargpt.files import replaced_folder
    from chargpt.text import read_text
    from chargpt.tokenizers import build_tokenizer

    config = load_params().tokenizer
    text = read_text(CORPUS)
    tokenizer = build_tokenizer(config, text)
    ids = tokenizer.encode(text)
    with replaced_folder(TOKENS) as folder:
        write_tokens(folder / "ids.npy", ids)
        tokenizer.save(folder / "tokenizer.json")
    print(f"tokenize: {len(text):,} characters, {len(ids):,} tokens of {tokenizer.vocab_size:,} symbols → {TOKENS}")


if __name__ == "__main__":
    with user_errors():  # around the imports in main too: Ctrl-C while they load is an ordinary stop
        main()
