"""What a configuration may say, and what is refused with which words."""

import dataclasses
import math
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from piflow_jax.config import Config, ConfigError, base_config, check_devices, parse
from piflow_jax.config.__main__ import reference
from tests.settings import changed, refusal

ROOT = Path(__file__).parents[1]


def leaves(node, prefix=""):
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}__")
        else:
            yield f"{prefix}{field.name}", value


LEAVES = dict(leaves(Config()))
TEXT = {"model__network": "qwen_image", "data__name": "prompts"}


def test_base_configuration_is_the_default():
    assert parse(base_config()) == Config()
    assert ml_collections.ConfigDict(dataclasses.asdict(Config())) == base_config()


@pytest.mark.parametrize("variant", [None, "mnist"])
def test_a_parsed_configuration_comes_back_from_its_dictionary(variant):
    values = {} if variant is None else {"data__name": variant, "train__nfe": 4}
    parsed = parse(changed(**values))
    again = parse(ml_collections.ConfigDict(dataclasses.asdict(parsed)))
    assert again == parsed
    # JSON turns tuples into lists.
    listed = dataclasses.asdict(parsed)
    listed["evaluation"]["teacher_steps"] = list(listed["evaluation"]["teacher_steps"])
    assert parse(ml_collections.ConfigDict(listed)) == parsed


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(base_config()).train.nfe = 2


# --- Keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("stepz", "config has seed, data, model"),
        ("train__stepz", "config.train has steps, batch_size"),
        ("train__optimizer__lr", "config.train.optimizer has kind, learning_rate"),
    ],
)
def test_unknown_keys_are_refused_with_the_known_ones(key, known):
    message = refusal(**{key: 1})
    assert f"unknown key config.{key.replace('__', '.')};" in message
    assert known in message


@pytest.mark.parametrize("key", ["seed", "train", "train.nfe", "teacher.optimizer.beta1"])
def test_missing_keys_are_refused(key):
    config = base_config()
    *groups, name = key.split(".")
    node = config
    for group in groups:
        node = node[group]
    del node[name]
    with pytest.raises(ConfigError, match=rf"missing key config\.{re.escape(key)} \("):
        parse(config)


def test_a_value_in_the_place_of_a_group_is_refused():
    assert refusal(train=3) == "config.train must be a group of keys, got 3"


# --- Types --------------------------------------------------------------------------------------


def wrong_values(value):
    """Values of another type than a default's."""
    if isinstance(value, bool):
        return [1, 0.0, "True", None]
    if isinstance(value, int):
        return [True, 1.0, "1", None, (1,)]
    if isinstance(value, float):
        return [True, "0.5", None, (0.5,), math.nan, math.inf, -math.inf]
    if isinstance(value, str):
        return [True, 1, None, ("digits",)]
    empty = [()] if value else []  # an empty default may be given
    other = 1 if value and isinstance(value[0], str) else "a"
    return [1, "1", None, *empty, (other,) * max(len(value), 1), (True,) * max(len(value), 1)]


@pytest.mark.parametrize("key", LEAVES)
def test_wrong_types_are_refused(key):
    name = f"config.{key.replace('__', '.')} must "
    for value in wrong_values(LEAVES[key]):
        message = refusal(**{key: value})
        assert message.startswith(name), (value, message)


def test_refusals_of_types_say_what_is_wanted():
    assert refusal(train__steps=1.5) == "config.train.steps must be of type int, got 1.5"
    assert refusal(train__nfe=True) == "config.train.nfe must be of type int, got True"
    assert refusal(train__data_free=1) == "config.train.data_free must be of type bool, got 1"
    assert refusal(train__shift="3.2") == "config.train.shift must be of type float, got '3.2'"
    assert refusal(train__shift=math.nan) == "config.train.shift must be finite, got nan"
    message = refusal(teacher__guidance_interval=(0.0, 0.5, 1.0))
    assert message.startswith("config.teacher.guidance_interval must have 2 entries")
    message = refusal(evaluation__teacher_steps=(1, 2.5))
    assert message == "config.evaluation.teacher_steps must be of type int, got 2.5"


def test_an_integer_is_taken_for_a_float():
    parsed = parse(
        changed(
            train__shift=3, teacher__guidance_interval=(0, 1), model__dit__time_scale=np.float64(7)
        )
    )
    assert type(parsed.train.shift) is float and parsed.train.shift == 3
    assert [type(end) for end in parsed.teacher.guidance_interval] == [float, float]
    assert parsed.model.dit.time_scale == 7


# --- Ranges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train__nfe", 0, "at least 1, got 0"),
        ("train__nfe", -3, "at least 1, got -3"),
        ("policy__num_components", 0, "at least 1, got 0"),
        ("policy__num_grid", 0, "at least 1, got 0"),
        ("train__num_states", 0, "at least 1, got 0"),
        ("train__total_substeps", 0, "at least 1, got 0"),
        ("train__window_substeps", -1, "at least 0, got -1"),
        ("train__shift", 0.0, "above 0, got 0.0"),
        ("train__final_step_size_scale", 0, "above 0, got 0.0"),
        ("train__gm_dropout", 1.0, "in [0, 0.99], got 1.0"),
        ("train__optimizer__learning_rate", 0.0, "above 0, got 0.0"),
        ("train__optimizer__beta2", 1.0, "in [0, 0.99999], got 1.0"),
        ("teacher__label_dropout", 1.01, "in [0, 1], got 1.01"),
        ("teacher__guidance_scale", 0.5, "at least 1, got 0.5"),
        ("teacher__guidance_interval", (-0.1, 0.5), "in [0, 1], got -0.1"),
        ("teacher__guidance_interval", (0.0, 1.1), "in [0, 1], got 1.1"),
        ("evaluation__teacher_steps", (1, 0), "at least 1, got 0"),
        ("evaluation__num_samples", 1, "at least 2, got 1"),
        (
            "data__name",
            "cifar",
            "one of 'digits', 'mnist', 'fashion_mnist', 'emoji', 'images', 'latents', 'prompts', "
            "'captioned_digits', 'edited_digits', got 'cifar'",
        ),
        ("policy__kind", "GM", "one of 'gm', 'dx', 'arc', got 'GM'"),
        ("model__dtype", "float16", "one of 'float32', 'bfloat16', got 'float16'"),
        ("train__optimizer__decay", "step", "one of 'constant', 'cosine', 'linear', got 'step'"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(key, value, allowed):
    message = refusal(**{key: value})
    assert message == f"config.{key.replace('__', '.')} must be {allowed}"


@pytest.mark.parametrize(
    "values",
    [
        {"train__gm_dropout": 0.99},
        {"train__optimizer__beta1": 0.0},
        {"teacher__guidance_interval": (0.3, 0.3)},
        {"train__window_substeps": 128},
        {"train__nfe": 4, "train__window_substeps": 32},
        {"train__nfe": 4, "train__final_step_size_scale": 0.5, "train__window_substeps": 18},
        {"policy__kind": "dx", "train__gm_dropout": 0.0},
        {"policy__kind": "dx", "train__gm_dropout": 0.0, "train__nfe": 3,
         "policy__segment_size": 1 / 3},
        {"teacher__guidance_scale": 2.0, "teacher__label_dropout": 0.0,
         "teacher__checkpoint": "elsewhere"},
        {"train__optimizer__decay": "cosine", "train__optimizer__warmup_steps": 2999},
    ],
)  # fmt: skip
def test_the_ends_of_ranges_are_accepted(values):
    parse(changed(**values))


# --- Values that contradict each other ----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model__dit__hidden": 66},
            "config.model.dit.hidden must be divisible by 4 and by config.model.dit.num_heads (4), "
            "got 66",
        ),
        (
            {"model__dit__num_heads": 5},
            "config.model.dit.hidden must be divisible by 4 and by config.model.dit.num_heads (5), "
            "got 64",
        ),
        (
            {"model__scan_unroll": 4},
            "config.model.scan_unroll must be in [1, config.model.dit.depth = 3], got 4",
        ),
        (
            {"teacher__guidance_interval": (0.6, 0.2)},
            "config.teacher.guidance_interval must be (low, high) with low <= high, got (0.6, 0.2)",
        ),
        (
            {"teacher__guidance_scale": 2.0, "teacher__label_dropout": 0.0},
            "config.teacher.label_dropout must be above 0 to train a teacher for guidance "
            "(config.teacher.guidance_scale is 2.0)",
        ),
        (  # 128 substeps over 4 segments
            {"train__nfe": 4, "train__window_substeps": 33},
            "config.train.window_substeps must be in [0, 32], the substeps of the shortest "
            "segment, got 33",
        ),
        (  # the last segment is half of the others: 128 / 7
            {
                "train__nfe": 4,
                "train__final_step_size_scale": 0.5,
                "train__window_substeps": 19,
            },
            "config.train.window_substeps must be in [0, 18], the substeps of the shortest "
            "segment, got 19",
        ),
        (  # the last segment is longer than the others: 128 / 4 is the shortest
            {"train__nfe": 2, "train__final_step_size_scale": 3.0, "train__window_substeps": 33},
            "config.train.window_substeps must be in [0, 32], the substeps of the shortest "
            "segment, got 33",
        ),
        (
            {"train__nfe_choices": (1, 4), "train__window_substeps": 33},
            "config.train.window_substeps must be in [0, 32], the substeps of the shortest "
            "segment, got 33",
        ),
        (
            {"train__nfe_choices": (2, 4)},
            "config.train.nfe_choices must contain config.train.nfe (1), which is the default of "
            "sampling, got (2, 4)",
        ),
        (
            {"train__nfe_choices": (1, 2), "train__data_free": True},
            "config.train.nfe_choices is for training with data, as a path without data has one "
            "number of segments: leave it empty, or set config.train.data_free = False",
        ),
        (
            {"train__state_power": 1.0, "train__mixing_steps": 10},
            "config.train.state_power is for states on the student's own path: set it to 0, or "
            "config.train.mixing_steps, got 10",
        ),
        (
            {"train__corrector__kind": "policy", "train__nfe": 2},
            "config.train.corrector.kind = 'policy' follows one policy from noise to data and "
            "needs config.train.nfe = 1, got 2; give 'critic'",
        ),
        (
            {"train__corrector__kind": "critic", "train__corrector__share": 0.3},
            "config.train.corrector.share = 0.3 is 3/10 of a batch, so config.train.batch_size "
            "must be divisible by 10, got 128",
        ),
        (
            {"train__corrector__kind": "critic", "train__corrector__guidance_interval": (0.5, 0.1)},
            "config.train.corrector.guidance_interval must be empty or (low, high) with "
            "low <= high, got (0.5, 0.1)",
        ),
        (
            {"train__corrector__kind": "critic", "train__corrector__guidance_interval": (0.0, 0.5)},
            "config.train.corrector.guidance_interval is for a teacher with guidance and must be "
            "empty with config.teacher.guidance_scale = 1",
        ),
        (
            {"train__corrector__kind": "critic", "train__corrector__levels": (0.9, 0.1)},
            "config.train.corrector.levels must be (low, high) with low < high, got (0.9, 0.1)",
        ),
        (
            {
                "train__corrector__kind": "critic",
                "train__corrector__optimizer__decay": "cosine",
                "train__corrector__optimizer__warmup_steps": 3000,
            },
            "config.train.corrector.optimizer.warmup_steps must be below config.train.steps "
            "(3000) for a schedule that decays, got 3000",
        ),
        (
            {"teacher__guidance_range": (1.0, 2.0, 3.0)},
            "config.teacher.guidance_range must be empty or (low, high) with low < high, "
            "got (1.0, 2.0, 3.0)",
        ),
        (
            {"teacher__guidance_range": (2.0, 4.0), "teacher__guidance_scale": 1.5},
            "config.teacher.guidance_scale is the default of sampling and must be in "
            "config.teacher.guidance_range (2.0, 4.0), got 1.5",
        ),
        (
            {"teacher__guidance_range": (1.0, 4.0), "train__corrector__kind": "policy"},
            "config.train.corrector.kind must be empty with config.teacher.guidance_range, as a "
            "corrector knows one guidance scale, got 'policy'",
        ),
        (
            {"teacher__guidance_range": (1.0, 4.0), "teacher__label_dropout": 0.0},
            "config.teacher.label_dropout must be above 0 to train a teacher for guidance "
            "(config.teacher.guidance_scale is 1.0, config.teacher.guidance_range (1.0, 4.0))",
        ),
        (
            {"evaluation__guidance": 2.0},
            "config.evaluation.guidance is for a student with config.teacher.guidance_range, whose "
            "guidance is an input: leave it at 0",
        ),
        (
            {"policy__kind": "dx"},
            "config.train.gm_dropout drops mixture components and must be 0 with "
            "config.policy.kind = 'dx', got 0.05",
        ),
        (
            {
                "policy__kind": "dx",
                "train__gm_dropout": 0.0,
                "train__nfe": 2,
                "policy__segment_size": 0.4,
            },
            "config.policy.segment_size must be 0 or at least the longest segment, 0.5, got 0.4",
        ),
        (
            {"train__optimizer__decay": "linear", "train__optimizer__warmup_steps": 3000},
            "config.train.optimizer.warmup_steps must be below config.train.steps (3000) for a "
            "schedule that decays, got 3000",
        ),
        (
            {"teacher__optimizer__decay": "cosine", "teacher__steps": 50},
            "config.teacher.optimizer.warmup_steps must be below config.teacher.steps (50) for a "
            "schedule that decays, got 100",
        ),
        (
            {"model__network": "flux", "model__flux__rope_axes": (4, 6, 6)},
            "config.model.network = 'flux' needs a data set with captions as config.data.name, got "
            "'digits'",
        ),
        (
            {"train__optimizer__growth_rate_scale": 0.1},
            "config.train.optimizer.growth_rate_scale is for rates of growth and must be 1 with "
            "config.policy.kind = 'gm', got 0.1",
        ),
        (
            {"policy__kind": "arc", "teacher__optimizer__growth_rate_scale": 0.1},
            "config.teacher.optimizer.growth_rate_scale is for the output layer of this package's "
            "students and must be 1 here, got 0.1",
        ),
        (
            {"data__name": "prompts"},
            "config.model.network = 'dit' needs a data set with classes as config.data.name, got "
            "'prompts'",
        ),
        (
            {"policy__kind": "dx", "train__gm_dropout": 0.0, "evaluation__temperature": 0.3},
            "config.evaluation.temperature belongs to a Gaussian mixture and must be 1 with "
            "config.policy.kind = 'dx', got 0.3",
        ),
        (
            {
                "policy__kind": "dx",
                "train__gm_dropout": 0.0,
                "train__nfe": 4,
                "evaluation__nfe": 2,
            },
            "config.evaluation.nfe (2) makes segments longer than those that a grid trained with "
            "config.train.nfe = 4 covers; raise it",
        ),
        (
            TEXT,
            "config.model.qwen_image.rope_axes must be three even numbers that add up to "
            "config.model.qwen_image.hidden / config.model.qwen_image.num_heads (64 / 4), got "
            "(16, 56, 56)",
        ),
        (
            TEXT | {"model__qwen_image__rope_axes": (4, 6, 6), "train__optimizer__kind": "muon"},
            "config.train.optimizer.kind = 'muon' is for the matrices of a DiT's blocks, not for "
            "config.model.network = 'qwen_image'; give 'adamw'",
        ),
        (
            TEXT | {"model__qwen_image__rope_axes": (4, 6, 6), "evaluation__every": 5},
            "config.evaluation.every must be 0 with config.data.name = 'prompts', got 5; look at "
            "checkpoints with --mode=sample",
        ),
    ],
)
def test_contradictions_are_refused(values, message):
    assert refusal(**values) == message


@pytest.mark.parametrize("group", ["teacher", "train", "evaluation"])
def test_batches_that_devices_cannot_share_are_refused(group):
    key, batch = f"{group}__batch_size", 36
    sizes = {f"{name}__batch_size": 32 for name in ("teacher", "train", "evaluation")}
    assert refusal(8, **sizes | {key: batch}) == (
        f"config.{group}.batch_size must be divisible by the 8 devices that share a batch, got 36"
    )
    parse(changed(**sizes), 8)
    parse(changed(**sizes | {key: batch}), 4)


@pytest.mark.parametrize(
    ("groups", "refused"),
    [((), None), (("evaluation",), "evaluation"), (("train", "evaluation"), "train")],
)
@pytest.mark.parametrize("text", [False, True])
def test_only_the_batches_that_are_used_must_divide(groups, refused, text):
    sizes = {f"{name}__batch_size": 36 for name in ("teacher", "train", "evaluation")}
    sizes |= TEXT | {"model__qwen_image__rope_axes": (4, 6, 6)} if text else {}
    config = parse(changed(**sizes), None)
    if refused is None:
        check_devices(config, 8, groups=groups)
        return
    with pytest.raises(
        ConfigError, match=rf"config\.{refused}\.batch_size must be divisible by the 8"
    ):
        check_devices(config, 8, groups=groups)


# --- Documentation ------------------------------------------------------------------------------


def test_every_key_is_documented():
    text = reference()
    for key in LEAVES:
        group, _, name = f"config.{key.replace('__', '.')}".rpartition(".")
        section = text.split(f"\n## `{group}`\n")[1].split("\n## ")[0]
        rows = re.findall(rf"^\| `{name}` \| (.+) \| `(.+)` \| (.*) \| (.+) \|$", section, re.M)
        assert len(rows) == 1, key
        assert rows[0][1] == repr(LEAVES[key])


def test_the_configuration_page_is_up_to_date():
    page = ROOT / "docs" / "configuration.md"
    assert page.exists() and page.read_text(encoding="utf-8") == reference(), (
        "docs/configuration.md does not say what piflow_jax/config does; make it again with "
        "`python -m piflow_jax.config > docs/configuration.md`"
    )
