"""The spec that describes a checkpoint's weights.

A spec is a flat dictionary of JSON values in a checkpoint's metadata. It holds everything that
changes the meaning of the weights and nothing else (no compute dtype, remat or attention). Its keys
stay the same when the configuration changes, so that old checkpoints remain readable.
"""

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

from piflow_jax.config import (
    Config,
    ConfigError,
    CorrectorConfig,
    ModelConfig,
    NetworkConfig,
    PolicyConfig,
    TeacherConfig,
    TrainConfig,
    base_config,
    check_group,
    key_types,
    naming,
    parse,
)
from piflow_jax.systems.networks import NETWORKS, network_kind
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.shapes import DataShape

TRAINED_IN = "trained_in"
"""Key of a student's recorded settings: names of the feature spaces that it was trained in."""

_SAMPLING = ("nfe", "final_step_size_scale", "shift", "total_substeps")
# Values with other names in older specs, and a key that they lack.
_RENAMED = {"data.name": {"imagenet": "latents"}}
_ADDED = {"data.vae": ""}
# Settings of a student's run that were added later, with their earlier values.
_LATER = {
    **{"train.initial": "", "train.solver": "euler", "train.nfe_choices": []},
    "train.state_power": 0.0,
    "teacher.loras": [],
    "teacher.guidance_range": [],
}
# The same, of runs with a corrector; others do not record its settings.
_LATER_OF_CORRECTOR = {
    f"train.corrector.{key}": getattr(CorrectorConfig(), key) for key in ("space", "population")
}


def updated(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Brings a spec of any age up to date: today's names, and values for keys added since."""
    network = spec.get("model.network", ModelConfig.network)
    kind = NETWORKS.get(network) if isinstance(network, str) else None
    added = {}
    if kind is not None:
        added = {key: value for key, value in _ADDED.items() if key[5:] in kind.data_spec}
        added |= {f"model.{key}": value for key, value in kind.added.items()}
    return added | {key: _renamed(key, value) for key, value in spec.items()}


def _renamed(key: str, value: Any) -> Any:
    renamed = _RENAMED.get(key, {})
    return renamed.get(value, value) if isinstance(value, str) else value


def config_keys(spec: Mapping[str, Any]) -> dict[str, str]:
    """What the configuration calls the keys of a spec, of those that it has."""
    own = f"config.model.{spec.get('model.network', ModelConfig.network)}"
    known, names = key_types(Config, "config"), {}
    for key in spec:
        # A network's settings have no name of their group in a spec. Shapes of the data, such as
        # `data.channels`, are not the settings of the same name.
        candidates = f"config.{key}", key.replace("model", own, 1)
        found = next((name for name in candidates if name in known), None)
        if found and (key == "data.name" or not key.startswith("data.")):
            names[key] = found
    return names


def model_settings(model: ModelConfig) -> dict[str, Any]:
    """Settings of the chosen network as nested values: the common ones and its own group."""
    groups = {field.name for field in dataclasses.fields(model) if field.name in NETWORKS}
    values = {key: value for key, value in vars(model).items() if key not in groups}
    return values | ({model.network: vars(model.own)} if model.network in groups else {})


def updated_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings from a checkpoint of any age, under today's keys."""
    network = saved.get("model.network", ModelConfig.network)
    own = {field.name for field in dataclasses.fields(own_settings(network))}
    common = {field.name for field in dataclasses.fields(ModelConfig)}
    settings = {}
    for key, value in saved.items():
        value = _renamed(key, value)
        group, _, name = key.partition(".")
        if group == "model" and name not in common and "." not in name:
            # Older runs have the settings of all networks in one group.
            if name not in own:
                continue
            key = f"model.{network}.{name}"
        settings[key] = value
    if "train.steps" in settings:
        settings = _LATER | settings
    if "train.corrector.kind" in settings:
        settings = _LATER_OF_CORRECTOR | settings
    for key in [key for key in settings if key.endswith(".optimizer.kind")]:
        settings.setdefault(f"{key.removesuffix('kind')}growth_rate_scale", 1.0)
    return settings


def own_settings(network: str) -> type:
    """The class of a network's own settings."""
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    return fields[network].default_factory if network in NETWORKS else NetworkConfig


def _model_spec(model: ModelConfig, data: DataShape) -> dict[str, Any]:
    kind, own = network_kind(model), model.own
    spec = {f"data.{key}": getattr(data, key) for key in kind.data_spec}
    values = {key: getattr(own, key) for key in kind.spec}
    if kind.named:
        values["network"] = model.network
    return spec | {
        f"model.{key}": list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }


def teacher_spec(config: Config, data: DataShape) -> dict[str, Any]:
    """The spec of a teacher's checkpoint."""
    return {"kind": "teacher"} | _model_spec(config.model, data)


def student_spec(config: Config, data: DataShape) -> dict[str, Any]:
    """The spec of a student's checkpoint: network, policy and sampling."""
    model, policy, teacher = config.model, config.policy, config.teacher
    adapted = network_kind(model).targets is not None
    guidance = {
        "teacher.guidance_scale": teacher.guidance_scale,
        "teacher.guidance_range": [*teacher.guidance_range],
    }
    return (
        {"kind": "student"}
        | _model_spec(model, data)
        | ({"model.lora_rank": model.own.lora_rank} if adapted else {})
        | {f"policy.{key}": getattr(policy, key) for key in POLICIES[policy.kind].spec}
        | {f"train.{key}": getattr(config.train, key) for key in _SAMPLING}
        # Not in the specs of students of one number, or of one scale, which are older.
        | ({"train.nfe_choices": [*config.train.nfe_choices]} if config.train.nfe_choices else {})
        | (guidance if teacher.guidance_range else {})
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """A student's settings as recorded in its checkpoint.

    Attributes:
      model: the network's settings.
      policy: the policy's settings.
      train: the distillation's settings.
      data: shape and conditions of the data.
      teacher: the guidance of its teacher if the scale is an input of the student; the defaults
        for other students.
      asked: for a user's own network, the `prediction` and `schedule` that define its inputs and
        outputs; see `OwnNetwork.spec`. Empty for our networks.
      trained_in: names of the feature spaces that it was trained in, where figures do not measure
        it.
    """

    model: ModelConfig
    policy: PolicyConfig
    train: TrainConfig
    data: DataShape
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained_in: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Config, data: DataShape, **more: Any) -> "StudentSettings":
        """Those of a configuration, for a student of `data`; `more` are further attributes."""
        model, policy, train, teacher = config.model, config.policy, config.train, config.teacher
        scales = teacher.guidance_range
        told = {"guidance_scale": teacher.guidance_scale, "guidance_range": scales}
        teacher = TeacherConfig(**told if scales else {})
        return cls(model=model, policy=policy, train=train, data=data, teacher=teacher, **more)


def spec_of(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The spec in a weight file's metadata, None without one; ConfigError for a damaged one."""
    text = metadata.get("piflow_jax")
    with naming("the settings in its metadata are damaged", TypeError, RecursionError):
        return None if text is None else dict(json.loads(text))


def spaces_in(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Feature spaces that a student was trained in, from a weight file's metadata."""
    with naming(f"its {TRAINED_IN} is damaged", TypeError, RecursionError):
        return tuple(map(str, json.loads(metadata.get(TRAINED_IN, "[]"))))


def check_policy_config(text: str | None, policy: PolicyConfig, train: TrainConfig) -> None:
    """Raises ConfigError if a file describes another policy than the settings do."""
    with naming("its policy_config is damaged", TypeError, RecursionError):
        found = {} if text is None else dict(json.loads(text))
    for key, value in POLICIES[policy.kind].official(policy, train).items():
        there = found.get(key, value)
        if there != value and not (
            isinstance(there, float) and math.isclose(there, value, rel_tol=1e-5)
        ):
            raise ConfigError(
                f"its policy_config has the {key} {there!r}, the settings make it {value!r}"
            )


def student_settings(spec: Mapping[str, Any]) -> StudentSettings:
    """Reads a student's spec.

    Args:
      spec: the result of `student_spec`, after a round trip through JSON.

    Returns:
      The settings; values added to specs since this one was made have their defaults.

    Raises:
      ConfigError: the spec is not a student's, is incomplete, or holds values that the schema of
        configurations refuses.
    """
    settings = _settings(spec, "student")
    _check_complete(spec, student_spec(settings, settings.data))
    return settings


def trained_with(settings: StudentSettings, saved: Mapping[str, Any]) -> StudentSettings:
    """Completes a student's settings for training; a spec holds only those that sampling needs.

    Args:
      settings: settings of the spec.
      saved: the run's settings by dotted key, as the checkpoint recorded them; may be empty.

    Returns:
      The settings. Settings without a record stay as they are; records of keys that no longer exist
      are ignored.

    Raises:
      ConfigError: the schema refuses a recorded value.
    """
    known, recorded = key_types(TrainConfig, "train"), dataclasses.asdict(settings.train)
    for key, value in updated_settings(saved).items():
        if key in known:
            _, *groups, name = key.split(".")
            functools.reduce(operator.getitem, groups, recorded)[name] = value
    recorded |= {key: getattr(settings.train, key) for key in (*_SAMPLING, "nfe_choices")}
    train = check_group(TrainConfig, recorded, "train")
    return dataclasses.replace(settings, train=train, trained_in=tuple(saved.get(TRAINED_IN, ())))


def teacher_settings(spec: Mapping[str, Any]) -> tuple[ModelConfig, DataShape]:
    """Reads a teacher's spec, see `student_settings`."""
    settings = _settings(spec, "teacher")
    _check_complete(spec, teacher_spec(settings, settings.data))
    return settings.model, settings.data


def _settings(spec: Mapping[str, Any], kind: str) -> StudentSettings:
    """The settings of a spec, which the schema checks like a configuration."""
    if not isinstance(spec, Mapping) or spec.get("kind") != kind:
        found = spec.get("kind") if isinstance(spec, Mapping) else spec
        raise ConfigError(f"this holds a {found}, not a {kind}")
    config = base_config().to_dict()
    names = ("model", "policy", "train", "data", "teacher", "asked")
    groups: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in updated(spec).items():
        group, _, name = key.partition(".")
        if group in groups and name:
            groups[group][name] = value
        elif key != "kind":
            raise ConfigError(f"unknown key {key}; this version reads {', '.join(groups)}")
    data = check_group(DataShape, groups.pop("data"), "data", complete=False)
    asked = groups.pop("asked")
    own = groups.pop("model")  # in a spec, a network's own settings have no group
    network = own.pop("network", ModelConfig.network)
    config["model"]["network"] = network
    if not isinstance(network, str) or (network not in NETWORKS and (":" not in network or own)):
        raise ConfigError(f"model.network = {network!r} is not one of {', '.join(NETWORKS)}")
    if network in NETWORKS:
        config["model"][network] |= own
    for group, values in groups.items():
        config[group] |= values
    config["train"]["gm_dropout"] = 0.0  # not in a spec
    parsed = parse(config, None)
    POLICIES[parsed.policy.kind].check(parsed)
    known = network_kind(parsed.model).data_spec
    square = "sample_size" in known and ("sites" not in known or data.sites is None)
    if square and not data.sample_size:
        raise ConfigError("data.sample_size must be at least 1, got 0")
    patch = getattr(parsed.model.own, "patch_size", 1)
    if data.sample_size % patch:
        raise ConfigError(
            f"model.patch_size ({patch}) must divide data.sample_size ({data.sample_size})"
        )
    return StudentSettings.of(parsed, data, asked=asked)


def _check_complete(spec: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing = sorted(set(wanted) - set(updated(spec)))
    if missing:
        raise ConfigError(f"the settings lack {', '.join(missing)}")
