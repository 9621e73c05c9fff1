"""Two versions of the project train the same bits: proof that a change moved code and changed no result.

Run as `python -m tests.golden OLD [NEW]`, commits or branches; NEW is the working tree where it is left out. Each
version trains three models for 60 steps on torch's kernels in float32, from its own folder and in this environment;
weights, losses and the sample at the end must be equal bit for bit. No bits are stored, because they depend on the CPU.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
COMMON = {"max_steps": 60, "eval_interval": 30, "backend": "torch", "precision": "fp32", "compile": "never"}
MODERN = {
    "block_size": 128,
    "n_head": 2,
    "position": "rotary",
    "norm": "rmsnorm",
    "mlp": "relu2",
    "qk_norm": True,
    "tied_head": False,
    "value_embeddings": True,
    "bigram_embeddings": True,
}
MUON = {"kind": "muon", "learning_rate": 0.02, "weight_decay": 0.3}
VARIANTS = {
    "bigram": {"model": {"kind": "bigram"}, "batch_size": 32, "order": "random", "grad_clip": None},
    "nanogpt-cpu": {"model": {"kind": "transformer"}, "order": "random"},
    "modern": {
        "model": {"kind": "transformer", **MODERN},
        "batch_size": 8,
        "optimizer": MUON,
        "schedule": {"kind": "wsd", "warmup_steps": 0, "decay_fraction": 1.0},
        "grad_clip": None,
        "ema_decay": 0.9,
    },
}
PROGRAM = "from chargpt.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="a commit (default: the working tree)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, commit in enumerate((options.old, options.new)):
            tree = Path(folder) / str(number)
            check_out(commit, tree)
            found.append({name: trained(tree, name) for name in VARIANTS})
    for name in VARIANTS:
        old, new = (versions[name] for versions in found)
        print(f"{name}: {'the same bits' if old == new else f'DIFFERENT: {differing(old, new)}'}")
    sys.exit(found[0] != found[1])


def check_out(commit: str | None, tree: Path) -> None:
    """The package of a commit, or of the working tree, without compiled modules."""
    tree.mkdir()
    if commit is None:
        shutil.copytree(ROOT / "chargpt", tree / "chargpt", ignore=shutil.ignore_patterns("_native*", "__pycache__"))
        return
    packed = subprocess.run(["git", "archive", commit, "chargpt"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", tree], input=packed, check=True)


def trained(tree: Path, name: str) -> dict[str, str]:
    """By what it is of: a fingerprint of each part of a run's result."""
    (tree / "text.txt").write_text(text(), encoding="utf-8")
    (tree / f"{name}.yaml").write_text(yaml.safe_dump(COMMON | VARIANTS[name]), encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, "train", "text.txt", "--config", f"{name}.yaml", "--out", name]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} did not train in {tree}:\n{done.stderr[-3000:]}")
    run = tree / name
    with safe_open(run / "best" / "model.safetensors", "pt") as file:
        parts = {key: file.get_tensor(key).numpy().tobytes() for key in sorted(file.keys())}
    curve = [line.split(",") for line in (run / "curve.csv").read_text(encoding="utf-8").splitlines()]
    columns = [curve[0].index(column) for column in ("step", "train_loss", "val_loss", "learning_rate")]
    parts["curve"] = json.dumps([[row[column] for column in columns] for row in curve]).encode()
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    parts["loss"] = repr(metrics["val_full"]).encode()
    parts["sample"] = (run / "sample.txt").read_bytes()
    return {part: hashlib.sha256(content).hexdigest() for part, content in parts.items()}


def text() -> str:
    """Some 100,000 characters that can be learnt."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(300)]
    return "".join(draw.choice(words) + draw.choice([" ", " ", " ", ", ", ".\n"]) for _ in range(17_000))


def differing(old: dict[str, str], new: dict[str, str]) -> str:
    parts = [part for part in {**old, **new} if old.get(part) != new.get(part)]
    return ", ".join(parts[:5]) + (f" and {len(parts) - 5} more" if len(parts) > 5 else "")


if __name__ == "__main__":
    main()
