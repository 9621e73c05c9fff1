"""Stage download: the corpus of `params.yaml` as data/raw/corpus.txt, checked and in UTF-8.

The one idea to know: DVC skips this stage while its parameters stay the same, so the network is needed once.
"""

from pathlib import Path

from chargpt.command import user_errors

CORPUS = Path("data/raw/corpus.txt")


def main() -> None:
    from chargpt.config import load_params
    from chargpt.text import prepare

    config = load_params().corpus
    prepare(config, CORPUS)
    print(f"download: {config.path or config.name}, {CORPUS.stat().st_size:,} bytes → {CORPUS}")


if __name__ == "__main__":
    with user_errors():  # around the imports in main too: Ctrl-C while they load is an ordinary stop
        main()
