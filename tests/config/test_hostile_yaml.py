"""What somebody may write into a file of knobs, or after --set: one sentence, soon, and no other number than meant."""

import time
from pathlib import Path

import pytest

from chargpt.config import TrainConfig, load_params, load_train_config, override
from chargpt.errors import ConfigError, shown


def bomb(levels: int, item: str = "x") -> str:
    lines = [f"a0: &a0 [{', '.join([item] * 10)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"max_steps: *a{levels - 1}"])


def merged(levels: int) -> str:
    lines = ["a0: &a0 {k0: 1, k1: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "aliases of aliases": bomb(9),
    "more of them": bomb(40),
    "merges of merges": merged(12),
    "itself": "max_steps: &a [*a]",
    "a long text": f"max_steps: {'x' * 100_000}",
    "a long name": f"{'x' * 100_000}: 1",
    "a long number": f"batch_size: -0x{'f' * 9_000}",
    "a longer number": f"batch_size: {'9' * 9_000}",
    "a number as a name": f"0x{'f' * 9_000}: 1",
    "a number in a list": f"batch_size: [0x{'f' * 9_000}]",
    "65 bits": f"max_steps: {2**64}",
    "an infinite width": "model: {kind: transformer, mlp_width: 1e308}",
    "a kind": f"model: {{kind: [{'x' * 10_000}]}}",
    "brackets": "max_steps: " + "[" * 5_000,
    "no number": "max_steps: .nan",
    "a set": "max_steps: !!set {a, b}",
    "bytes": f"max_steps: !!binary {'A' * 10_000}",
    "an object": "max_steps: !!python/object/apply:os.system [true]",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_one_sentence_of_bounded_length_and_soon(what: str, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(HOSTILE[what])
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_train_config(tmp_path / "v.yaml")
    assert time.process_time() - start < 20  # hundreds of times what it takes
    assert len(str(caught.value)) < 1500
    assert str(caught.value).startswith(str(tmp_path / "v.yaml"))


@pytest.mark.parametrize(
    "assignment",
    [
        *("model.mlp_width=1e308", "max_steps=1" + "0" * 400, "batch_size=1" + "0" * 400, "model.n_embd=1" + "0" * 400),
        *(
            "x" * 100_000,
            "model." + "x" * 100_000 + "=1",
            "max_steps=" + "[" * 3000,
            "batch_size=017",
            "max_steps=1:30",
        ),
    ],
)
def test_an_assignment_is_as_safe(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(TrainConfig(), [assignment])
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("number", ["017", "-017", "0b11", "1:30", "1:30.5", "190:20:30", "0_7"])
def test_what_is_another_number_in_yaml_is_refused(number: str, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(f"max_steps: {number}\n")
    with pytest.raises(ConfigError, match="is another number in YAML than it seems"):
        load_train_config(tmp_path / "v.yaml")


@pytest.mark.parametrize(("text", "steps"), [("17", 17), ("1_000", 1000), ("0x10", 16), ("+5", 5)])
def test_plain_numbers_are_what_they_seem(text: str, steps: int) -> None:
    assert override(TrainConfig(), [f"max_steps={text}"]).max_steps == steps


@pytest.mark.parametrize(
    "text",
    [
        "max_steps: 5\nmax_steps: 6\n",
        "model:\n  kind: bigram\n  kind: transformer\n",
        "optimizer: {beta1: 0.5, beta2: 0.5, beta1: 0.6}\n",
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(ConfigError, match="stands here twice"):
        load_train_config(tmp_path / "v.yaml")


def test_a_merge_may_be_overridden_and_used_again(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "ablation: {variants: [b, c], seeds: [1]}\n"
        "variants:\n  a: &a {max_steps: 1, batch_size: 2}\n"
        "  b: &b {<<: *a, max_steps: 3}\n  c: {<<: *b, batch_size: 4}\n"
    )
    variants = load_params(tmp_path / "p.yaml").variants
    assert [(v.max_steps, v.batch_size) for v in variants.values()] == [(1, 2), (3, 2), (3, 4)]


def test_what_is_no_file_or_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    with (tmp_path / "long.yaml").open("wb") as file:
        file.truncate(2**33)
    for name in ("link.yaml", "long.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_train_config(tmp_path / name)


def test_values_are_shown_as_python_writes_them_but_for_long_ones() -> None:
    assert [shown(value) for value in (1.5, "a b", None, [1, 2], {"a": 1})] == [
        "1.5",
        "'a b'",
        "None",
        "[1, 2]",
        "{'a': 1}",
    ]
    assert shown(-(16**9000)) == "a number of 10,837 digits"
    assert len(shown(["x" * 1000] * 1000)) < 500
