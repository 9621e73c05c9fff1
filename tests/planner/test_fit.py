"""Fitting a preset to a text, a machine and a time: what is chosen, and that every choice says why."""

import dataclasses
import math
from collections.abc import Callable

import pytest

from chargpt.config import BigramConfig, TrainConfig, TransformerConfig, override
from chargpt.config.presets import PRESETS
from chargpt.errors import ConfigError, CorpusError, TrainingError
from chargpt.evaluation import TOKENS_PER_PASS
from chargpt.models import build_model, parameter_count, parameter_estimate
from chargpt.planner import (
    Fitted,
    Machine,
    Request,
    Text,
    assigned,
    fit,
    steps_in,
    validation_fraction,
)
from chargpt.planner.fit import (
    DROPOUT,
    EVALUATION_SHARE,
    EVALUATIONS,
    FEWEST_SCORED,
    MOST_PASSES,
    MOST_VALIDATION,
    TAUGHT_WEIGHT_DECAY,
    TUNED_ON,
)
from chargpt.training import Speed, require_memory, required_memory

MILLION = Text(train_tokens=TUNED_ON, val_tokens=111_540, vocab_size=65)


def machine(
    training: float = 50_000, evaluation: float = 150_000, gpu: bool = False, memory: int | None = None
) -> Machine:
    return Machine(gpu, memory, lambda config: Speed(training, evaluation))


def text_of(tokens: int, vocab_size: int = 65) -> Text:
    val = int(tokens * validation_fraction(tokens)[0])
    return Text(tokens - val, val, vocab_size)


def transformer(fitted: Fitted) -> TransformerConfig:
    assert isinstance(fitted.config.model, TransformerConfig)
    return fitted.config.model


def said(fitted: Fitted, knob: str) -> list[str]:
    return [reason for reason in fitted.reasons if reason.startswith(f"{knob} ")]


# ------------------------------------------------------------------------------------------------ preset and precedence


@pytest.mark.parametrize(
    ("minutes", "gpu", "name"),
    [
        (None, False, "modern"),
        (None, True, "modern"),
        (0.5, False, "modern"),
        (3, False, "modern"),
        (3.1, False, "cpu-best"),
        (600, False, "cpu-best"),
        (3, True, "cpu-best"),
        (60, True, "cpu-best"),
    ],
)
def test_the_time_chooses_the_preset_and_a_gpu_takes_the_larger(minutes: float | None, gpu: bool, name: str) -> None:
    fitted = fit(Request(minutes=minutes), text_of(100_000_000), machine(gpu=gpu))
    assert fitted.name == name
    assert transformer(fitted).n_embd == PRESETS[name].model.n_embd  # type: ignore[union-attr]
    assert fitted.reasons[0].startswith(f"preset {name}: ")
    if minutes is None:
        assert fitted.config.max_steps == PRESETS[name].max_steps
        assert not said(fitted, "max_steps")
    else:
        seconds = fitted.config.max_steps * fitted.config.tokens_per_step / 50_000
        assert seconds == pytest.approx(60 * minutes, rel=0.01)
        assert len(said(fitted, "max_steps")) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stays_as_tuned_on_a_text_and_time_like_those_it_was_tuned_for(name: str) -> None:
    fitted = fit(Request(preset=name), MILLION, machine(training=100_000))
    free = ["eval_interval=1", "eval_tokens=null", "patience=null"]
    tuned = override(PRESETS[name], free)
    assert override(fitted.config, free) == tuned
    assert {reason.split()[0] for reason in fitted.reasons} <= {"preset", "eval_interval", "eval_tokens", "patience"}


def test_a_wrong_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no preset is called 'modem'; did you mean modern"):
        fit(Request(preset="modem"), MILLION, machine())


def test_what_the_user_sets_is_touched_by_nothing() -> None:
    assignments = (
        *("model.dropout=0.05", "model.block_size=64", "eval_interval=7", "eval_tokens=900", "patience=2"),
        *("batch_size=64", "max_steps=100000"),
    )
    fitted = fit(Request(assignments=assignments), text_of(20_000), machine(memory=2**30))
    assert fitted.config == override(PRESETS["modern"], list(assignments))
    assert len(fitted.reasons) == 1  # the preset


def test_minutes_and_steps_by_hand_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="--minutes and --set max_steps"):
        assigned(TrainConfig(), Request(minutes=3, assignments=("max_steps=100",)))


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_minutes_are_positive(minutes: float) -> None:
    with pytest.raises(ConfigError, match="--minutes must be positive and at most"):
        assigned(TrainConfig(), Request(minutes=minutes))


def test_minutes_become_steps_by_the_measured_speed() -> None:
    config = PRESETS["modern"]  # 4,096 tokens a step
    assert steps_in(1, config, Speed(40_960, 1)) == 600
    assert steps_in(1e-6, config, Speed(1, 1)) == 1


def test_another_kind_of_model_keeps_its_own_defaults_and_gives_its_name() -> None:
    fitted = fit(Request(assignments=("model.kind=bigram",)), text_of(300_000), machine(training=1e7))
    assert (fitted.name, fitted.config.model) == ("bigram", BigramConfig())


# ----------------------------------------------------------------------------------------------------- to the text


def test_a_short_text_is_read_fewer_times_with_more_dropout() -> None:
    found = [fit(Request(minutes=2), text_of(tokens), machine()) for tokens in (3_000_000, 600_000, 300_000, 50_000)]
    dropouts = [transformer(fitted).dropout for fitted in found]
    assert dropouts == sorted(dropouts)
    assert dropouts[0] == 0 < dropouts[-1] == DROPOUT[-1][1]
    passes = steps_in(2, PRESETS["modern"], Speed(50_000, 1)) * 4096 / text_of(300_000).train_tokens
    assert said(found[2], "dropout") == [
        f"dropout {dropouts[2]} in place of 0.0: the run reads the text {passes:.1f} times"
    ]
    assert [fitted.config.max_steps for fitted in found[:3]] == [1465] * 3  # 6 million tokens
    assert found[3].config.max_steps == pytest.approx(MOST_PASSES * 45_000 / 4096, abs=1)
    assert len(said(found[3], "max_steps")) == 2  # for the time, and then fewer


@pytest.mark.parametrize("preset", ["modern", "cpu-best"])
@pytest.mark.parametrize("tokens", [50_000, 1_000_000])
def test_a_student_has_little_decay_and_no_dropout_however_often_it_reads(preset: str, tokens: int) -> None:
    taught = fit(Request(preset=preset, teachers=3), text_of(tokens), machine())
    assert taught.config.optimizer.weight_decay == TAUGHT_WEIGHT_DECAY
    assert transformer(taught).dropout == 0
    assert taught.config.max_steps == PRESETS[preset].max_steps
    assert len(said(taught, "weight_decay")) == 1


def test_a_students_decay_and_dropout_that_are_set_by_hand_stay() -> None:
    by_hand = ("optimizer.weight_decay=0.7", "model.dropout=0.4")
    taught = fit(Request(preset="cpu-best", assignments=by_hand, teachers=1), MILLION, machine())
    assert taught.config.optimizer.weight_decay == 0.7
    assert transformer(taught).dropout == 0.4
    assert not said(taught, "weight_decay")
    less = fit(Request(preset="cpu-best", assignments=("optimizer.weight_decay=0.01",), teachers=1), MILLION, machine())
    assert less.config.optimizer.weight_decay == 0.01


def test_a_faster_machine_reads_more_often_and_so_drops_out_more() -> None:
    slow, fast = (
        transformer(fit(Request(minutes=3), text_of(300_000), machine(training=training))).dropout
        for training in (5_000, 100_000)
    )
    assert slow < fast


@pytest.mark.parametrize("tokens", [120, 300, 1_000, 5_000, 20_000, 50_000, 10**6, 10**7, 10**8])
def test_any_text_gives_windows_to_train_and_to_validate_on(tokens: int) -> None:
    text = text_of(tokens)
    for name in PRESETS:
        block = fit(Request(preset=name), text, machine()).config.model.block_size
        assert block <= PRESETS[name].model.block_size
        assert 4 * block <= min(text.train_tokens, text.val_tokens)
        if tokens >= 20_000:
            assert block == PRESETS[name].model.block_size


def test_a_text_of_a_few_words_is_refused() -> None:
    with pytest.raises(CorpusError, match="22 tokens are too few to learn from"):
        fit(Request(), text_of(22), machine())


def test_the_validation_part_is_a_tenth_but_larger_of_a_tiny_text_and_limited_of_a_huge_one() -> None:
    assert validation_fraction(1_115_394)[0] == 0.1
    assert validation_fraction(300)[0] == 0.2
    assert validation_fraction(10**8)[0] * 10**8 == pytest.approx(MOST_VALIDATION)
    assert validation_fraction(int(MOST_VALIDATION * 10.01))[0] == pytest.approx(0.1, rel=0.01)


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("minutes", [0.5, 3, 60])
@pytest.mark.parametrize("tokens", [100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("training", [2_000, 200_000])
def test_evaluations_take_a_tenth_of_the_time_at_most(minutes: float, tokens: int, training: float) -> None:
    """But for the least that tells one checkpoint from another."""
    text, speed = Text(tokens * 9 // 10, tokens // 10, 65), Speed(training, 3 * training)
    fitted = fit(Request(minutes=minutes), text, Machine(False, None, lambda config: speed))
    config = fitted.config
    scored = min(text.val_tokens, config.eval_tokens or text.val_tokens)
    steps = config.max_steps
    seconds = steps * config.tokens_per_step / training
    evaluations = steps / config.eval_interval
    assert evaluations < EVALUATIONS[1] * 1.5
    if scored > FEWEST_SCORED and steps > EVALUATIONS[1]:
        assert evaluations * scored / speed.evaluation <= 1.3 * EVALUATION_SHARE * seconds
    assert (config.eval_tokens is None) == (scored == text.val_tokens) == (not said(fitted, "eval_tokens"))
    assert config.patience is not None
    assert config.patience >= 4
    assert len(said(fitted, "eval_interval")) == len(said(fitted, "patience")) == 1


@pytest.mark.parametrize(("evaluation", "count"), [(1_000, 10), (10_000_000, 30)])
def test_a_run_is_evaluated_ten_to_thirty_times(evaluation: float, count: int) -> None:
    """The fewest where they are dear, the most where they cost nothing."""
    config = fit(Request(minutes=3), MILLION, machine(evaluation=evaluation)).config
    assert config.max_steps / config.eval_interval == pytest.approx(count, abs=0.2)


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["nanogpt-cpu", "modern"])
@pytest.mark.parametrize("vocab_size", [65, 700])
def test_parameters_are_counted_without_building_the_model(name: str, vocab_size: int) -> None:
    model = PRESETS[name].model
    assert parameter_estimate(model, vocab_size) == pytest.approx(
        parameter_count(build_model(model, vocab_size, seed=1, backend="torch")), rel=0.01
    )


def test_the_parameters_of_other_models_are_counted_too() -> None:
    plain = TransformerConfig(n_layer=2, n_embd=32, n_kv_head=2)
    for model in (
        BigramConfig(),
        plain,
        dataclasses.replace(plain, mlp="swiglu", position="rotary", mlp_width=2.5),
        dataclasses.replace(plain, mlp="none", residual=False, tied_head=False),
    ):
        exact = parameter_count(build_model(model, 50, seed=1, backend="torch"))
        assert parameter_estimate(model, 50) == pytest.approx(exact, rel=0.02)


def test_less_memory_halves_the_batch_and_keeps_the_tokens_of_a_step() -> None:
    config = PRESETS["cpu-best"]
    memory = required_memory(config, 65) * 2 // 3
    fitted = fit(Request(preset="cpu-best"), MILLION, machine(memory=memory))
    assert fitted.config.batch_size < config.batch_size
    assert fitted.config.tokens_per_step == config.tokens_per_step
    assert required_memory(fitted.config, 65) <= memory
    assert said(fitted, "batch_size")
    with pytest.raises(TrainingError, match=r"about [\d,]+ MiB of memory, and 1 MiB are free; lower batch_size"):
        fit(Request(preset="cpu-best"), MILLION, machine(memory=2**20))
    with pytest.raises(TrainingError, match="lower batch_size"):  # not where the user chose the batch
        fit(Request(preset="cpu-best", assignments=("batch_size=32",)), MILLION, machine(memory=memory))


def test_a_large_vocabulary_needs_no_unbounded_memory() -> None:
    """Chinese has some thousand characters: the logits and the table of pairs are what grows."""
    for name in ("modern", "cpu-best"):
        required = required_memory(PRESETS[name], 4_000)
        assert required < 3 * 2**30
        assert required > TOKENS_PER_PASS * 4_000 * 4  # the logits of an evaluation
    huge = fit(Request(), Text(10**6, 10**5, 100_000), machine(memory=8 * 2**30)).config
    assert required_memory(huge, 100_000) <= 8 * 2**30


def test_memory_that_is_not_known_refuses_nothing() -> None:
    require_memory(PRESETS["cpu-best"], 10**6, None)


def test_the_speed_is_measured_for_the_model_that_will_run() -> None:
    asked: list[TrainConfig] = []

    def speed(config: TrainConfig) -> Speed:
        asked.append(config)
        return Speed(50_000, 150_000)

    measured: Callable[[TrainConfig], Speed] = speed
    fitted = fit(Request(minutes=2), text_of(100_000), Machine(False, None, measured))
    assert asked[-1].model == fitted.config.model
    assert len(asked) <= 2
