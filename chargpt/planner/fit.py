"""How `chargpt train` fits a preset to a text, a machine and a time: a pure function, with a reason for each choice.

The one idea to know: what decides is how often the run will read the text, and that follows from the number of steps.
Minutes become steps here, once, by the measured speed; from then on there is no clock. Nothing that the user set by
hand is touched.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from chargpt.config import TrainConfig, TransformerConfig, override
from chargpt.config.presets import PRESETS
from chargpt.console import duration
from chargpt.errors import ConfigError, CorpusError, nearest
from chargpt.training import Speed, require_memory, required_memory

MOST_MINUTES = 1_000_000  # two years
MODERN_MINUTES = 3  # on a CPU; for more, and on a GPU, it is cpu-best
# Passes over the text up to which a dropout is enough, and the dropout.
DROPOUT = ((6, 0.0), (10, 0.1), (25, 0.2), (math.inf, 0.3))
TUNED_ON = 1_003_854  # tokens of training text on which the presets were tuned, each for its own time
TAUGHT_WEIGHT_DECAY = 0.05  # of a student: with 0.2 it was as good, with 0.5 slower and a little worse
MOST_PASSES = 40  # the loss of 30,000 characters was lowest after 22 to 27 passes with a dropout of 0.3
EVALUATION_SHARE = 0.1  # of the time of training
EVALUATIONS = (10, 30)  # fewest and most in one run
FEWEST_SCORED = 16_384  # validation tokens; fewer would choose the best checkpoint by chance
MOST_VALIDATION = 500_000  # tokens: the error of a mean over so many is below a hundredth of a nat
SHORTEST_BLOCK = 4  # tokens


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    preset: str | None = None
    minutes: float | None = None
    assignments: tuple[str, ...] = ()  # key=value, as in `override`
    teachers: int = 0  # trained models whose mean prediction is to be learned


@dataclass(frozen=True)
class Text:
    """What matters of a text."""

    train_tokens: int
    val_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Machine:
    """What matters of a machine. `speed` is called once or twice, and may take some seconds to measure."""

    gpu: bool
    memory: int | None  # bytes that are free; None: not known
    speed: Callable[[TrainConfig], Speed]


class _Choices:
    """A config in the making, with a reason for each change; knobs that the user set stay as they are."""

    def __init__(self, config: TrainConfig, fixed: frozenset[str]) -> None:
        self.config, self.fixed, self.reasons = config, fixed, list[str]()

    def set(self, reason: str, knobs: dict[str, object]) -> None:
        """Change knobs, all of them or, where one is the user's, none."""
        if not self.fixed & knobs.keys():
            self.config = override(self.config, [f"{key}={value}" for key, value in knobs.items()])
            self.reasons.append(reason)


@dataclass(frozen=True)
class Fitted:
    """A config, the name for it (of its preset, or of another kind of model), and a line for each choice."""

    config: TrainConfig
    name: str
    reasons: tuple[str, ...]


def fit(request: Request, text: Text, machine: Machine) -> Fitted:
    """A config for this text, machine and time, with reasons.

    In order of precedence: the request's assignments, its minutes, what is fitted here, the preset. Raises ConfigError
    for an unknown preset, assignments that `override` refuses, or minutes beside max_steps among the assignments,
    CorpusError for a text of a few words, and TrainingError when the model does not fit into the memory.
    """
    name, reason = choose_preset(request, machine.gpu)
    fixed = frozenset(assignment.partition("=")[0] for assignment in request.assignments)
    choices = _Choices(assigned(PRESETS[name], request), fixed)
    choices.reasons.append(reason)
    _fit_block(choices, text)
    _fit_memory(choices, text, machine)
    before, speed = choices.config.model, machine.speed(choices.config)
    if request.minutes is not None:  # what dropout hangs on; by its own speed once that is chosen
        steps = steps_in(request.minutes, choices.config, speed)
        choices.config = dataclasses.replace(choices.config, max_steps=steps)
    if request.teachers:
        _fit_teachers(choices)
    else:
        _fit_dropout(choices, text, PRESETS[name])
    if choices.config.model != before:
        speed = machine.speed(choices.config)
    if request.minutes is not None:
        _fit_minutes(choices, request.minutes, speed)
    if not request.teachers:
        _fit_passes(choices, text, PRESETS[name])
    _fit_evaluation(choices, text, speed)
    kind = choices.config.model.kind
    return Fitted(choices.config, name if kind == PRESETS[name].model.kind else kind, tuple(choices.reasons))


def validation_fraction(tokens: int) -> tuple[float, str]:
    """The last part of a text of so many tokens to validate on, and why."""
    if tokens * 0.1 > MOST_VALIDATION:
        return MOST_VALIDATION / tokens, f"the last {MOST_VALIDATION:,} tokens measure a loss to a hundredth"
    if tokens < 10_000:
        return 0.2, "a tenth of so short a text would measure nothing"
    return 0.1, "the last tenth of the text"


def choose_preset(request: Request, gpu: bool) -> tuple[str, str]:
    """The name of the preset to start from, and a line that says why. Raises ConfigError for an unknown one."""
    if request.preset is not None:
        if request.preset not in PRESETS:
            raise ConfigError(f"no preset is called {request.preset!r}{nearest(request.preset, PRESETS)}")
        return request.preset, f"preset {request.preset}: asked for"
    if request.minutes is None:
        return "modern", "preset modern: the default; --minutes N chooses by the time there is"
    name = "cpu-best" if gpu or request.minutes > MODERN_MINUTES else "modern"
    return name, f"preset {name}: the usual one for {request.minutes:g} min on a {'GPU' if gpu else 'CPU'}"


def assigned(preset: TrainConfig, request: Request) -> TrainConfig:
    """The preset under the assignments. Raises ConfigError as `override` does, for minutes that are not positive, and
    for minutes beside an assigned number of steps."""
    if request.minutes is not None:
        if not 0 < request.minutes <= MOST_MINUTES:
            raise ConfigError(f"--minutes must be positive and at most {MOST_MINUTES:,}, got {request.minutes:g}")
        if any(assignment.startswith("max_steps=") for assignment in request.assignments):
            raise ConfigError("--minutes and --set max_steps=… both set how long to train; leave one out")
    return override(preset, list(request.assignments))


def steps_in(minutes: float, config: TrainConfig, speed: Speed) -> int:
    """How many steps of `config` take so many minutes of training."""
    return max(1, round(60 * minutes * speed.training / config.tokens_per_step))


# -------------------------------------------------------------------------------------------------------- its choices


def _fit_block(choices: _Choices, text: Text) -> None:
    block = choices.config.model.block_size
    longest = min(text.train_tokens - 1, text.val_tokens) // 4
    if block > longest and "model.block_size" not in choices.fixed:
        if longest < SHORTEST_BLOCK:
            raise CorpusError(
                f"{text.train_tokens + text.val_tokens} tokens are too few to learn from; some ten thousand are a "
                f"beginning, a million is good"
            )
        shorter = 2 ** (longest.bit_length() - 1)
        choices.set(
            f"block_size {shorter} in place of {block}: {text.val_tokens:,} tokens to validate on hold few windows",
            {"model.block_size": shorter},
        )


def _fit_memory(choices: _Choices, text: Text, machine: Machine) -> None:
    """Half batches, two of them in a step, while the whole ones do not fit."""
    config = choices.config
    halved = config
    while halved.batch_size % 2 == 0 and not _fits(halved, text, machine):
        batch, passes = halved.batch_size // 2, halved.gradient_accumulation_steps * 2
        halved = dataclasses.replace(halved, batch_size=batch, gradient_accumulation_steps=passes)
    if halved is not config:
        assert machine.memory is not None
        choices.set(
            f"batch_size {halved.batch_size} in place of {config.batch_size}, "
            f"{halved.gradient_accumulation_steps} batches to a step: {machine.memory / 2**20:,.0f} MiB are free",
            {
                "batch_size": halved.batch_size,
                "gradient_accumulation_steps": halved.gradient_accumulation_steps,
            },
        )
    require_memory(choices.config, text.vocab_size, machine.memory)


def _fit_minutes(choices: _Choices, minutes: float, speed: Speed) -> None:
    steps = steps_in(minutes, choices.config, speed)
    choices.set(
        f"max_steps {steps:,}: {minutes:g} min of training at {speed.training:,.0f} tokens a second, as measured now",
        {"max_steps": steps},
    )


def _passes(config: TrainConfig, text: Text) -> float:
    """How often the run reads the text."""
    return config.max_steps * config.tokens_per_step / text.train_tokens


def _as_tuned(config: TrainConfig, text: Text, preset: TrainConfig) -> bool:
    """Whether the run reads its text no more often than the preset read the text that it was tuned on."""
    return _passes(config, text) <= 1.2 * preset.max_steps * preset.tokens_per_step / TUNED_ON


def _fit_dropout(choices: _Choices, text: Text, preset: TrainConfig) -> None:
    """Against overfitting, by how often the run will read the text."""
    config = choices.config
    if isinstance(config.model, TransformerConfig) and not _as_tuned(config, text, preset):
        passes = min(_passes(config, text), MOST_PASSES)
        dropout = next(dropout for most, dropout in DROPOUT if passes <= most)
        if dropout != config.model.dropout:
            choices.set(
                f"dropout {dropout} in place of {config.model.dropout}: the run reads the text {passes:.1f} times",
                {"model.dropout": dropout},
            )


def _fit_passes(choices: _Choices, text: Text, preset: TrainConfig) -> None:
    """Not so many steps that the run learns the text by heart."""
    config, passes = choices.config, _passes(choices.config, text)
    if passes > MOST_PASSES and not _as_tuned(config, text, preset):
        fewer = max(1, round(config.max_steps * MOST_PASSES / passes))
        choices.set(
            f"max_steps {fewer:,} in place of {config.max_steps:,}: reading the text {passes:.0f} times would learn it "
            f"by heart; {MOST_PASSES} times do",
            {"max_steps": fewer},
        )


def _fit_teachers(choices: _Choices) -> None:
    """Hardly any weight decay, and no dropout: what teachers predict is not learned by heart as a text is."""
    decay = choices.config.optimizer.weight_decay
    if decay > TAUGHT_WEIGHT_DECAY:
        choices.set(
            f"weight_decay {TAUGHT_WEIGHT_DECAY} in place of {decay}: what teachers predict is not learned by heart as "
            f"a text is",
            {"optimizer.weight_decay": TAUGHT_WEIGHT_DECAY},
        )


def _fit_evaluation(choices: _Choices, text: Text, speed: Speed) -> None:
    config = choices.config
    steps_per_second = speed.training / config.tokens_per_step
    steps = config.max_steps
    seconds = steps / steps_per_second
    affordable = EVALUATION_SHARE * seconds * speed.evaluation  # tokens
    fewest, most = EVALUATIONS
    scored = max(FEWEST_SCORED, round(affordable / fewest))
    if scored < text.val_tokens:
        choices.set(
            f"eval_tokens {scored:,}: evaluations during training score the first {scored / text.val_tokens:.0%} of "
            f"the validation text, to save time; the results are of all of it",
            {"eval_tokens": scored},
        )
    scored = min(text.val_tokens, choices.config.eval_tokens or text.val_tokens)
    interval = max(1, round(steps / min(most, max(fewest, affordable / scored))))
    spent = scored / speed.evaluation / (interval / steps_per_second)
    choices.set(
        f"eval_interval {interval}: an evaluation and a checkpoint about every "
        f"{duration(interval / steps_per_second)}, for {spent:.0%} more time",
        {"eval_interval": interval},
    )
    patience = max(4, steps // choices.config.eval_interval // 3)
    choices.set(
        f"patience {patience}: the run ends early after {patience} evaluations without a lower validation loss",
        {"patience": patience},
    )


# ------------------------------------------------------------------------------------------------------------- memory


def _fits(config: TrainConfig, text: Text, machine: Machine) -> bool:
    return machine.memory is None or required_memory(config, text.vocab_size) <= machine.memory
