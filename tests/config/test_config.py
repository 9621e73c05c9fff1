"""The configuration: what `params.yaml` accepts, and one clear sentence for everything else."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.config import (
    AblationConfig,
    BigramConfig,
    EvaluationConfig,
    OptimizerConfig,
    Params,
    SampleConfig,
    ScheduleConfig,
    SplitConfig,
    TrainConfig,
    TransformerConfig,
    differences,
    flatten,
    load_params,
    load_train_config,
    override,
    parse,
    schema,
)
from chargpt.errors import ConfigError, nearest

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {"ablation": {"variants": ["a"], "seeds": [1]}, "variants": {"a": {}}}


def written(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def with_variant(**fields: Any) -> dict[str, Any]:
    return MINIMAL | {"variants": {"a": fields}}


# ------------------------------------------------------------------------------------------------- the repository's own


def test_the_repositorys_params_parse_and_hold_nanogpts_published_cpu_configuration() -> None:
    params = load_params(ROOT / "params.yaml")
    assert set(params.ablation.variants) <= params.variants.keys()
    published = params.variants["nanogpt-cpu"]
    # nanoGPT samples with replacement; fp32 without compilation is what the CPU run of its README amounts to.
    assert published == dataclasses.replace(TrainConfig(), order="random", precision="fp32", compile="never")
    assert isinstance(published.model, TransformerConfig)
    assert (published.model.n_layer, published.model.n_head, published.model.n_embd) == (4, 4, 128)
    assert (published.model.block_size, published.batch_size, published.max_steps) == (64, 12, 2000)
    assert isinstance(params.variants["bigram"].model, BigramConfig)


def test_params_yaml_names_every_knob_so_that_a_user_finds_them_there() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for group in dataclasses.fields(Params):
        assert group.name in raw
    model = raw["variants"]["nanogpt-cpu"]["model"]
    assert model.keys() == {field.name for field in dataclasses.fields(TransformerConfig)}
    assert raw["variants"]["nanogpt-cpu"].keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    assert raw["sample"].keys() == {field.name for field in dataclasses.fields(SampleConfig)}
    assert raw["evaluation"].keys() == {field.name for field in dataclasses.fields(EvaluationConfig)}


def test_a_plain_dict_and_the_dataclass_are_the_same_thing() -> None:
    params = load_params(ROOT / "params.yaml")
    assert parse(Params, dataclasses.asdict(params), "again") == params


# ------------------------------------------------------------------------------------------------- what users get wrong


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (MINIMAL | {"corpsu": {}}, ["unknown key corpsu", "did you mean corpus"]),
        (with_variant(optimiser={}), ["unknown key variants.a.optimiser", "did you mean variants.a.optimizer?"]),
        (
            with_variant(model={"kind": "transformer", "n_layers": 2}),
            ["a.model.n_layers; did you mean variants.a.model.n_layer?"],
        ),
        (with_variant(optimizer={"lr": 1e-3}), ["unknown key variants.a.optimizer.lr", "known: ", "learning_rate"]),
        (with_variant(zzz=1), ["unknown key variants.a.zzz", "known: ", "max_steps"]),
        (with_variant(max_steps="many"), ["variants.a.max_steps must be a whole number, got 'many'"]),
        (with_variant(max_steps=2.0), ["variants.a.max_steps must be a whole number, got 2.0"]),
        (with_variant(batch_size=True), ["variants.a.batch_size must be a whole number, got True"]),
        (with_variant(grad_clip=True), ["variants.a.grad_clip must be a number, got True"]),
        (with_variant(grad_clip="high"), ["variants.a.grad_clip must be a number, got 'high'"]),
        (with_variant(batch_size=None), ["variants.a.batch_size must be a whole number, got None"]),
        (
            with_variant(model={"kind": "transformer", "bias": 1}),
            ["variants.a.model.bias must be true or false, got 1"],
        ),
        (with_variant(device=0), ["variants.a.device must be a text, got 0"]),
        (with_variant(order="epochs"), ["variants.a.order must be one of epoch, random, got 'epochs'"]),
        (with_variant(precision=["fp32"]), ["variants.a.precision must be one of auto, fp32, bf16"]),
        (with_variant(model={"kind": "gpt"}), ["variants.a.model.kind must be one of bigram, transformer, got 'gpt'"]),
        (with_variant(model={"kind": "biggram"}), ["variants.a.model.kind", "did you mean bigram?"]),
        (with_variant(model={"kind": ["bigram"]}), ["variants.a.model.kind must be one of", "['bigram']"]),
        (with_variant(model={"kind": {}}), ["variants.a.model.kind must be one of", "{}"]),
        (with_variant(model={}), ["variants.a.model.kind must be one of"]),
        (with_variant(model="bigram"), ["variants.a.model must be a group of knobs, got 'bigram'"]),
        (with_variant(schedule=[]), ["variants.a.schedule must be a group of knobs, got []"]),
        (
            with_variant(max_seconds=60),
            ["unknown key variants.a.max_seconds; a run is a number of steps: set max_steps"],
        ),
        (with_variant(sampling="epoch"), ["unknown key variants.a.sampling; its name is `order`"]),
        (with_variant(max_steps=None), ["variants.a.max_steps must be a whole number, got None"]),
        (with_variant(max_steps=0), ["variants.a: max_steps must be at least 1, got 0"]),
        (with_variant(ema_decay=10**400), ["variants.a.ema_decay must be a number"]),
        (with_variant(optimizer={"learning_rate": "1e-3x"}), ["variants.a.optimizer.learning_rate must be a number"]),
        (MINIMAL | {"sample": {"prompts": "ROMEO:"}}, ["sample.prompts must be a list, got 'ROMEO:'"]),
        (MINIMAL | {"sample": {"prompts": ["", 7]}}, ["sample.prompts[1] must be a text, got 7"]),
        (MINIMAL | {"ablation": {"variants": ["a"], "seeds": ["x"]}}, ["ablation.seeds[0] must be a whole number"]),
        (MINIMAL | {"ablation": {"variants": ["a"], "seeds": [-1]}}, ["ablation: seeds", "at least 0", "-1"]),
        (MINIMAL | {"ablation": {"variants": ["a"], "seeds": [1, 1]}}, ["ablation: seeds", "once", "1"]),
        (MINIMAL | {"ablation": {"variants": [], "seeds": [1]}}, ["ablation: variants", "at least one"]),
        (MINIMAL | {"ablation": {"variants": ["a"], "seeds": []}}, ["ablation: seeds", "at least one"]),
        (MINIMAL | {"ablation": {"variants": ["a", "a"], "seeds": [1]}}, ["ablation: variants", "once", "a"]),
        (MINIMAL | {"ablation": {"variants": ["b"], "seeds": [1]}}, ["ablation.variants names 'b'"]),
        (MINIMAL | {"ablation": {"variants": ["a"]}}, ["ablation.seeds is missing"]),
        ({"variants": {}}, ["ablation is missing"]),
        (MINIMAL | {"variants": ["a"]}, ["variants must be a group of named entries"]),
        (MINIMAL | {"variants": {"a": {}, 7: {}}}, ["variants", "must be a text, got 7"]),
        (MINIMAL | {"variants": {"a": {}, "../b": {}}}, ["variants", "'../b'", "letters"]),
        (MINIMAL | {1: 2}, ["unknown key 1"]),
        (MINIMAL | {None: 2}, ["unknown key None"]),
        ([], ["the file must be a group of knobs, got []"]),
        (None, ["the file must be a group of knobs, got None"]),
        ("text", ["the file must be a group of knobs"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(raw: object, wanted: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Params, raw, "params.yaml")
    message = str(caught.value)
    assert message.startswith("params.yaml: ")
    for part in wanted:
        assert part in message


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: [1", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("\ta: 1", "is not valid YAML"),
        ("a: 2020-13-45", "is not valid YAML"),  # PyYAML lets a ValueError through
        ("a: !!int x", "is not valid YAML"),
        ("a: !!bool maybe", "is not valid YAML"),  # … a KeyError
        ("a: !!timestamp x", "is not valid YAML"),  # … an AttributeError
        ("a: !!python/object/apply:os.system [id]", "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),  # … a RecursionError
        ("", "the file must be a group of knobs, got None"),
        ("- 1\n- 2", "the file must be a group of knobs"),
        ("just words", "the file must be a group of knobs"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused(tmp_path: Path, text: str, wanted: str) -> None:
    path = written(tmp_path, text)
    for load in (load_params, load_train_config):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert wanted in str(caught.value)


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        load_params(written(tmp_path, "corpus:\n  name: [x\n"))


def test_a_missing_file_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_params(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_params(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read"):
        load_params(binary)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (SplitConfig, {"val_fraction": 0}),
        (SplitConfig, {"val_fraction": 1}),
        (BigramConfig, {"block_size": 0}),
        (TransformerConfig, {"n_layer": 0}),
        (TransformerConfig, {"n_embd": 0}),
        (TransformerConfig, {"n_head": 0}),
        (TransformerConfig, {"block_size": -1}),
        (TransformerConfig, {"n_embd": 130}),
        (TransformerConfig, {"n_embd": 10**400 + 1}),  # too large for a float
        (TransformerConfig, {"n_kv_head": 3}),
        (TransformerConfig, {"n_kv_head": 0}),
        (TransformerConfig, {"n_kv_head": 8}),
        (TransformerConfig, {"n_embd": 12, "n_head": 4, "position": "rotary"}),
        (TransformerConfig, {"mlp_width": 0.0}),
        (TransformerConfig, {"mlp_width": 0.001}),  # rounds to no hidden channel at all
        (TransformerConfig, {"residual": False}),  # with an MLP four times as wide
        (TransformerConfig, {"dropout": 1.0}),
        (TransformerConfig, {"dropout": -0.1}),
        (TransformerConfig, {"logit_softcap": 0.0}),
        (OptimizerConfig, {"learning_rate": 0.0}),
        (OptimizerConfig, {"muon_learning_rate": -1.0}),
        (OptimizerConfig, {"beta1": 1.0}),
        (OptimizerConfig, {"beta2": -0.1}),
        (OptimizerConfig, {"muon_momentum": 1.0}),
        (OptimizerConfig, {"weight_decay": -1.0}),
        (ScheduleConfig, {"warmup_steps": -1}),
        (ScheduleConfig, {"min_lr_ratio": 1.1}),
        (ScheduleConfig, {"decay_fraction": 0.0}),
        (TrainConfig, {"batch_size": 0}),
        (TrainConfig, {"gradient_accumulation_steps": 0}),
        (TrainConfig, {"eval_interval": 0}),
        (TrainConfig, {"eval_tokens": 0}),
        (TrainConfig, {"patience": 0}),
        (TrainConfig, {"log_interval": 0}),
        (TrainConfig, {"grad_clip": 0.0}),
        (TrainConfig, {"ema_decay": 1.0}),
        (EvaluationConfig, {"nanogpt_batches": 0}),
        (EvaluationConfig, {"sliding_stride": 0}),
        (EvaluationConfig, {"seed": -1}),
        (SampleConfig, {"num_samples": 0}),
        (SampleConfig, {"max_new_tokens": -1}),
        (SampleConfig, {"temperature": -0.1}),
        (SampleConfig, {"top_k": 0}),
        (SampleConfig, {"top_p": 0.0}),
        (SampleConfig, {"top_p": 1.1}),
        (SampleConfig, {"seed": 2**64}),  # torch would raise an overflow
    ],
)
def test_a_value_out_of_range_is_refused_wherever_the_dataclass_is_built(cls: type, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**fields)
    assert any(name in str(caught.value) for name in fields)


FLOATS = [
    (cls, field.name)
    for cls in (SplitConfig, TransformerConfig, OptimizerConfig, ScheduleConfig, TrainConfig, SampleConfig)
    for field in dataclasses.fields(cls)
    if field.type in (float, float | None)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("cls", "name"), FLOATS)
def test_numbers_must_be_finite(cls: type, name: str, value: float) -> None:
    fields = {name: value}
    with pytest.raises(ConfigError, match=name):
        cls(**fields)


@pytest.mark.parametrize(("n_embd", "n_head", "works"), [(130, 4, 132), (131, 4, 132), (3, 8, 8), (385, 6, 384)])
def test_the_width_that_the_error_names_works(n_embd: int, n_head: int, works: int) -> None:
    with pytest.raises(ConfigError, match=f"nearest n_embd that works is {works}$"):
        TransformerConfig(n_embd=n_embd, n_head=n_head)
    TransformerConfig(n_embd=works, n_head=n_head)


# ------------------------------------------------------------------------------------------------ what YAML really says


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("0.001", 1e-3), ("1.0e-3", 1e-3), ("1", 1.0), ("'0.5'", 0.5), ("1_0.5", 10.5)]
)
def test_every_usual_way_to_write_a_number_is_read(tmp_path: Path, text: str, value: float) -> None:
    path = written(tmp_path, f"optimizer: {{learning_rate: {text}}}\n")
    read = load_train_config(path).optimizer.learning_rate
    assert read == value
    assert type(read) is float


def test_groups_that_are_left_out_take_their_defaults() -> None:
    params = parse(Params, MINIMAL, "here")
    assert params.variants["a"] == TrainConfig()
    assert params.sample == SampleConfig()
    assert params.ablation == AblationConfig(("a",), (1,))


def test_unicode_prompts_are_read(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL | {"sample": {"prompts": ["", "日本", "😀"]}}, allow_unicode=True)
    assert load_params(written(tmp_path, text)).sample.prompts == ("", "日本", "😀")


def test_tokens_per_step_counts_accumulation() -> None:
    assert TrainConfig(batch_size=6, gradient_accumulation_steps=2).tokens_per_step == 12 * 64


# --------------------------------------------------------------------------------------------------------------- --set


def test_assignments_change_one_knob_each_and_are_typed_as_in_yaml() -> None:
    config = override(
        TrainConfig(),
        ["model.n_layer=6", "optimizer.learning_rate=3e-4", "grad_clip=null", "model.bias=true", "device=cuda:1"],
    )
    assert isinstance(config.model, TransformerConfig)
    assert (config.model.n_layer, config.optimizer.learning_rate, config.grad_clip) == (6, 3e-4, None)
    assert config.model.bias is True
    assert config.device == "cuda:1"
    assert config.batch_size == TrainConfig().batch_size


def test_assignments_leave_the_config_they_start_from_alone() -> None:
    config = TrainConfig()
    override(config, ["batch_size=3", "model.n_head=2"])
    assert config == TrainConfig()
    assert override(config, []) == config


def test_another_kind_of_model_starts_from_its_defaults_whatever_the_order() -> None:
    assert override(TrainConfig(), ["model.kind=bigram"]).model == BigramConfig()
    for assignments in (["model.kind=bigram", "model.block_size=16"], ["model.block_size=16", "model.kind=bigram"]):
        assert override(TrainConfig(), assignments).model == BigramConfig(block_size=16)
    same = override(TrainConfig(), ["model.n_layer=2", "model.kind=transformer"])
    assert same.model == TransformerConfig(n_layer=2)


@pytest.mark.parametrize(
    ("assignment", "wanted"),
    [
        ("model.n_layer", "--set takes key=value"),
        ("=5", "unknown key"),
        ("", "--set takes key=value"),
        ("modell.n_layer=6", "'modell' is no group of knobs; did you mean model?"),
        ("model.n_layer.x=6", "'n_layer' is no group of knobs"),
        ("model.n_layers=6", "unknown key model.n_layers; did you mean model.n_layer?"),
        ("model.layers=6", "unknown key model.layers; did you mean model.n_layer?"),
        ("n_layer=6", "unknown key n_layer; did you mean model.n_layer?"),
        ("n_layers=6", "unknown key n_layers; did you mean model.n_layer?"),
        ("momentum=0.9", "unknown key momentum; did you mean optimizer.muon_momentum?"),
        ("model.n_layer=six", "model.n_layer must be a whole number, got 'six'"),
        ("model.n_layer=[", "is not valid YAML"),
        ("model.n_layer=2020-13-45", "is not valid YAML"),
        ("model.n_layer=", "model.n_layer must be a whole number, got None"),
        ("model.n_embd=130", "model: n_embd must be divisible by n_head"),
        ("model.kind=gpt", "model.kind must be one of bigram, transformer, got 'gpt'"),
        ("model.kind=[]", "model.kind must be one of"),
        ("model=5", "model must be a group of knobs, got 5"),
        ("optimizer=adamw", "optimizer must be a group of knobs"),
        ("max_seconds=60", "a run is a number of steps"),
    ],
)
def test_a_wrong_assignment_is_refused(assignment: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(TrainConfig(), [assignment])
    assert "--set" in str(caught.value)
    assert wanted in str(caught.value)


# ---------------------------------------------------------------------------------------------------- flat dicts, hints


def test_flat_dicts_have_dotted_keys_and_differences_are_readable() -> None:
    old, new = flatten(TrainConfig()), flatten(override(TrainConfig(), ["model.n_layer=6", "grad_clip=null"]))
    assert old["model.n_layer"] == 4
    assert old["optimizer.kind"] == "adamw"
    assert differences(old, new) == ["grad_clip: 1.0 → None", "model.n_layer: 4 → 6"]
    assert differences(old, old) == []
    assert differences({"a": 1}, {}) == ["a: 1 → (not set)"]


def test_a_hint_names_the_nearest_or_all() -> None:
    assert nearest("n_layers", ["n_layer", "n_head"]) == "; did you mean n_layer?"
    assert nearest("zzz", ["n_layer", "n_head"]) == "; known: n_layer, n_head"


# ---------------------------------------------------------------------------------------------------------------- fuzz

KEYS = sorted(
    {field.name for cls in (Params, TrainConfig, TransformerConfig, SampleConfig) for field in dataclasses.fields(cls)}
    | {"kind", "learning_rate", "warmup_steps", "a", "junk"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.dates(),
    st.sampled_from(["bigram", "transformer", "adamw", "cosine", "1e-3", 10**400]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.integers(), st.none()), inner, max_size=5),
    ),
    max_leaves=12,
)


def refusal(function: Callable[..., object], *arguments: object) -> str | None:
    """The ConfigError that a call raises, as text; any other exception is a failure of the test."""
    try:
        function(*arguments)
    except ConfigError as error:
        return str(error)
    return None


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_any_tree_of_data_parses_or_is_a_config_error(tree: object) -> None:
    for cls in (Params, TrainConfig):
        message = refusal(parse, cls, tree, "fuzz.yaml")
        assert message is None or message.startswith("fuzz.yaml: ")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KEYS), TREES, st.sampled_from(["", "model.", "optimizer.", "schedule."]))
def test_any_value_of_a_known_knob_parses_or_is_a_config_error(key: str, value: object, group: str) -> None:
    raw = dataclasses.asdict(TrainConfig())
    (raw[group.rstrip(".")] if group else raw)[key] = value
    message = refusal(parse, TrainConfig, raw, "fuzz.yaml")
    assert message is None or message.startswith("fuzz.yaml: ")
    if message is None:
        config = parse(TrainConfig, raw, "fuzz.yaml")
        assert override(config, []) == config


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_after_set_is_taken_or_is_a_config_error(text: str) -> None:
    for assignment in (text, f"max_steps={text}", f"model.kind={text}"):
        message = refusal(override, TrainConfig(), [assignment])
        assert message is None or "--set" in message


def test_a_config_cannot_change_under_whoever_holds_it() -> None:
    found = [part for part in vars(schema).values() if isinstance(part, type) and dataclasses.is_dataclass(part)]
    assert len(found) > 8
    assert all(part.__dataclass_params__.frozen for part in found)  # type: ignore[attr-defined]
