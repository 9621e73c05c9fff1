"""Stage sample: what a trained variant writes, for every prompt of params.yaml."""

import argparse
from pathlib import Path

from chargpt.command import user_errors
from pipelines.train import MODELS
from pipelines.workspace import borrow_native_module

SAMPLES = Path("samples")


def main() -> None:
    borrow_native_module()
    from chargpt.checkpoint import load_model
    from chargpt.config import load_params
    from chargpt.files import replaced_file
    from chargpt.generation import generate_text

    parser = argparse.ArgumentParser(description="Sample from one variant, trained with the first seed.")
    parser.add_argument("--variant", required=True)
    variant = parser.parse_args().variant
    params = load_params()
    config = params.sample
    model, tokenizer = load_model(MODELS / f"{variant}-s{params.ablation.seeds[0]}")

    settings = ", ".join(
        f"{name} {value}"
        for name in ("temperature", "top_k", "top_p", "min_p", "keep", "seed")
        if (value := getattr(config, name)) is not None
    )
    parts = []
    for prompt in config.prompts:
        for text in generate_text(model, tokenizer, prompt, config):
            parts.append(f"=== {variant}, {f'prompt {prompt!r}' if prompt else 'no prompt'}, {settings}\n\n{text}\n\n")
    with replaced_file(SAMPLES / f"{variant}.txt") as file:
        file.write("".join(parts).encode())
    print(f"sample: {len(parts)} texts of {variant} → {SAMPLES / variant}.txt")


if __name__ == "__main__":
    with user_errors():  # around the imports in main too: Ctrl-C while they load is an ordinary stop
        main()
