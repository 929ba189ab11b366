"""From a `ConfigDict` to the frozen schema, or to the refusal with the key and what is allowed."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ml_collections

from piflow_jax.config.schema import Config

# Of the tiles in which a TPU keeps matrices, whatever their type.
_TILE_ROWS = 8
# Into which parameters are split where nothing is said; a power of two.
_MOST_PARTS = 16


class ConfigError(ValueError):
    """A configuration names an unknown key, a wrong type or an impossible value."""


def base_config() -> ml_collections.ConfigDict:
    """A configuration with every key at its default, to be changed by a config file."""
    return _as_config_dict(Config())


def _as_config_dict(node: Any) -> ml_collections.ConfigDict:
    values = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        values[field.name] = _as_config_dict(value) if dataclasses.is_dataclass(value) else value
    return ml_collections.ConfigDict(values)


def parse(config: ml_collections.ConfigDict, num_devices: int | None = 1) -> Config:
    """Checks a configuration and freezes it.

    Args:
      config: what a config file made and flags changed.
      num_devices: devices of all processes; None leaves them to `check_devices`.

    Returns:
      The frozen configuration.

    Raises:
      ConfigError: on an unknown or missing key, a wrong type, a value out of range, or values that
        contradict each other. The message names the key and what is allowed.
    """
    parsed = check_group(Config, config, "config")
    _check_together(parsed)
    if num_devices is not None:
        check_devices(parsed, num_devices)
    return parsed


def check_group(cls: type, values: Any, name: str, *, complete: bool = True) -> Any:
    """Checks the values of one group of keys against its dataclass, and of the groups inside it.

    Args:
      cls: the dataclass; metadata of its fields, where there is some, is that of the schema.
      values: plain values by key, as a `ConfigDict` or JSON has them; lists are taken for tuples.
      name: of the group, such as `config.train`, for messages.
      complete: whether every key must be there; keys that are not get their default otherwise.

    Returns:
      An instance of the dataclass.

    Raises:
      ConfigError: on an unknown or missing key, a wrong type or a value out of range.
    """
    if not isinstance(values, ml_collections.ConfigDict | Mapping):
        raise ConfigError(f"{name} must be a group of keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in sorted(set(values) - set(fields), key=str):
        raise ConfigError(
            f"unknown key {name}.{key};{nearest(str(key), fields)} {name} has {', '.join(fields)}"
        )
    hints = typing.get_type_hints(cls)
    checked = {}
    for key, field in fields.items():
        if key not in values:
            if complete or _has_no_default(field):
                doc = field.metadata.get("doc") or hints[key].__name__
                raise ConfigError(f"missing key {name}.{key} ({doc})")
            continue
        value, hint = values[key], hints[key]
        if dataclasses.is_dataclass(hint):
            checked[key] = check_group(hint, value, f"{name}.{key}", complete=complete)
        else:
            checked[key] = _parse_value(value, hint, field.metadata, f"{name}.{key}")
    return cls(**checked)


def nearest(word: str, known: Iterable[str]) -> str:
    """` did you mean X?`, of the known word that is most like an unknown one; empty if none is."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" did you mean {found[0]}?" if found else ""


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _parse_value(value: Any, hint: Any, allowed: types.MappingProxyType, key: str) -> Any:
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{key} must be a tuple, got {value!r}")
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise ConfigError(f"{key} must have {len(items)} entries, got {value!r}")
        if not value and not allowed.get("may_be_empty"):
            raise ConfigError(f"{key} must not be empty")
        return tuple(_parse_value(entry, items[0], allowed, key) for entry in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key} must be of type {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {value}")
    low, high, above, choices = (allowed.get(name) for name in ("low", "high", "above", "choices"))
    if choices is not None and value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if above is not None and not value > above:
        raise ConfigError(f"{key} must be above {above}, got {value}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ConfigError(f"{key} must be {bounds}, got {value}")
    return value


def mesh_sizes(config: Config, num_devices: int, num_slices: int = 1) -> dict[str, int]:
    """Sizes of the mesh's axes in their order, with -1 filled in.

    Args:
      config: the parsed configuration.
      num_devices: devices of all processes.
      num_slices: TPU slices that they are of.

    Returns:
      `data`, `fsdp` and `tensor`, whose product is the number of devices.

    Raises:
      ConfigError: a size is 0, more than one is -1 (but for `data` with `fsdp`), they do not
        multiply to that number, or the slices do not divide `data`.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    for axis, size in sizes.items():
        if size == 0:
            raise ConfigError(f"config.mesh.{axis} must be at least 1, or -1 to fill, got 0")
    if sizes["data"] == sizes["fsdp"] == -1 and sizes["tensor"] > 0:
        # Finer parts than whole tiles are padded, more than a few save little memory, and of groups
        # as large as a slice the compiler makes worse programs, see docs/scaling.md.
        tiles, rest = divmod(config.model.hidden, _TILE_ROWS)
        room = max(num_devices // (sizes["tensor"] * num_slices), 1)
        most = math.gcd(room, tiles, _MOST_PARTS, _rank(config))
        sizes["fsdp"] = 1 if rest else most
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ConfigError(
            f"only one size of config.mesh may be -1, or data and fsdp, {open_axes} are"
        )
    for axis in open_axes:  # the product has the sign of its -1
        sizes[axis] = max(-num_devices // math.prod(sizes.values()), 1)
    if math.prod(sizes.values()) != num_devices:
        text = " x ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in sizes)
        raise ConfigError(f"config.mesh ({text}) does not fit the {num_devices} devices")
    if sizes["data"] % num_slices:
        raise ConfigError(
            f"config.mesh.data ({sizes['data']}) must be divisible by the {num_slices} slices; "
            f"lower config.mesh.fsdp ({sizes['fsdp']}) or config.mesh.tensor ({sizes['tensor']}) "
            f"until their product divides the {num_devices // num_slices} devices of a slice"
        )
    return sizes


def _rank(config: Config) -> int:
    """The rank of the adapters, along which some factors are split; 0 without adapters."""
    return 0 if config.model.network == "dit" else config.model.lora_rank


def check_devices(
    config: Config,
    num_devices: int,
    num_processes: int = 1,
    num_slices: int = 1,
    groups: Collection[str] | None = None,
) -> dict[str, int]:
    """Refuses a mesh and batches that do not fit the devices.

    Args:
      config: the parsed configuration.
      num_devices: devices of all processes.
      num_processes: processes, which take turns in sampling, each on its own devices.
      num_slices: see `mesh_sizes`.
      groups: those of `train`, `teacher` and `evaluation` whose batches are used; by default those
        of training.

    Returns:
      Sizes of the mesh's axes, see `mesh_sizes`.

    Raises:
      ConfigError: the mesh does not fit, or a batch cannot be divided; names the key.
    """
    train = config.train
    sizes = mesh_sizes(config, num_devices, num_slices)
    if config.model.num_heads % sizes["tensor"]:
        raise ConfigError(
            f"config.mesh.tensor ({sizes['tensor']}) must divide config.model.num_heads "
            f"({config.model.num_heads})"
        )
    for key, size in (("hidden", config.model.hidden), ("lora_rank", _rank(config))):
        if size % sizes["fsdp"]:
            raise ConfigError(
                f"config.mesh.fsdp ({sizes['fsdp']}) must divide config.model.{key} ({size})"
            )
    parts = sizes["data"] * sizes["fsdp"]
    # A network that reads text is too large to be whole on a device: all of them share a sample.
    samplers = num_devices // num_processes if config.model.network == "dit" else parts
    if groups is None:
        # No teacher is trained on prompts, and nothing sampled while a student is.
        of_prompts = config.data.name == "prompts"
        groups = ("train",) if of_prompts else ("train", "teacher", "evaluation")
    batches = {
        "train": (train.batch_size, parts),
        "teacher": (config.teacher.batch_size, parts),
        "evaluation": (config.evaluation.batch_size, samplers),
    }
    for group in groups:
        key, (batch, over) = f"{group}.batch_size", batches[group]
        if batch % over:
            raise ConfigError(
                f"config.{key} must be divisible by the {over} devices that share a batch, "
                f"got {batch}"
            )
    if "train" in groups and train.batch_size % (train.microbatches * parts):
        raise ConfigError(
            f"config.train.microbatches times the {parts} devices that share a batch must divide "
            f"config.train.batch_size ({train.batch_size}), got {train.microbatches}"
        )
    return sizes


def _check_together(config: Config) -> None:
    """Refuses values that are possible alone and not together."""
    model, train, policy, teacher = config.model, config.train, config.policy, config.teacher
    if model.hidden % 4 or model.hidden % model.num_heads:
        raise ConfigError(
            f"config.model.hidden must be divisible by 4 and by config.model.num_heads "
            f"({model.num_heads}), got {model.hidden}"
        )
    if model.scan_unroll > model.depth:
        raise ConfigError(
            f"config.model.scan_unroll must be in [1, config.model.depth = {model.depth}], "
            f"got {model.scan_unroll}"
        )
    _check_text(config)
    if teacher.checkpoint and teacher.weights:
        raise ConfigError(
            "config.teacher.checkpoint and config.teacher.weights are both given; empty one of them"
        )
    if config.profile and (len(config.profile) != 2 or config.profile[0] > config.profile[1]):
        raise ConfigError(
            "config.profile must be empty or (first, last) with first <= last, got "
            f"{config.profile}"
        )
    low, high = teacher.guidance_interval
    if low > high:
        raise ConfigError(
            f"config.teacher.guidance_interval must be (low, high) with low <= high, "
            f"got {teacher.guidance_interval}"
        )
    if (
        teacher.guidance_scale > 1
        and teacher.label_dropout == 0
        and not (teacher.checkpoint or teacher.weights)
    ):
        raise ConfigError(
            "config.teacher.label_dropout must be above 0 to train a teacher for guidance "
            f"(config.teacher.guidance_scale is {teacher.guidance_scale})"
        )
    shortest = min(1.0, train.final_step_size_scale) / (train.nfe - 1 + train.final_step_size_scale)
    room = max(round(shortest * train.total_substeps), 1)
    if train.window_substeps > room:
        raise ConfigError(
            f"config.train.window_substeps must be in [0, {room}], the substeps of the shortest "
            f"segment, got {train.window_substeps}"
        )
    if policy.kind == "dx" and train.gm_dropout > 0:
        raise ConfigError(
            "config.train.gm_dropout drops mixture components and must be 0 with "
            f"config.policy.kind = 'dx', got {train.gm_dropout}"
        )
    longest = _longest_segment(train.nfe, train.final_step_size_scale)
    if policy.kind == "dx" and 0 < policy.segment_size < longest - 1e-9:
        raise ConfigError(
            f"config.policy.segment_size must be 0 or at least the longest segment, {longest:.6g}, "
            f"got {policy.segment_size}"
        )
    evaluations = config.sampling_nfe
    sampled = _longest_segment(evaluations, train.final_step_size_scale)
    if policy.kind == "dx" and sampled > (policy.segment_size or longest) + 1e-9:
        raise ConfigError(
            f"config.evaluation.nfe ({evaluations}) makes segments longer than those that a grid "
            f"trained with config.train.nfe = {train.nfe} covers; raise it"
        )
    for stage, optimizer, steps in (
        ("teacher", teacher.optimizer, teacher.steps),
        ("train", train.optimizer, train.steps),
    ):
        if optimizer.decay != "constant" and optimizer.warmup_steps >= steps:
            raise ConfigError(
                f"config.{stage}.optimizer.warmup_steps must be below config.{stage}.steps "
                f"({steps}) for a schedule that decays, got {optimizer.warmup_steps}"
            )


def _longest_segment(nfe: int, final_step_size_scale: float) -> float:
    """As `flow.schedule.longest_segment`; settings are read before anything of JAX is."""
    if nfe == 1:
        return 1.0
    return max(1.0, final_step_size_scale) / (nfe - 1 + final_step_size_scale)


def _check_text(config: Config) -> None:
    """Refuses a network without its kind of conditions, and settings that it has no use for."""
    model, reads_text = config.model, config.model.network != "dit"
    of_text = ("prompts", "captioned_digits")
    if reads_text != (config.data.name in of_text):
        wanted = " or ".join(map(repr, of_text)) if reads_text else "a data set with classes"
        raise ConfigError(
            f"config.model.network = {model.network!r} needs {wanted} as config.data.name, "
            f"got {config.data.name!r}"
        )
    if config.policy.kind != "gm" and config.evaluation.temperature != 1:
        raise ConfigError(
            "config.evaluation.temperature is that of a mixture and must be 1 with "
            f"config.policy.kind = {config.policy.kind!r}, got {config.evaluation.temperature}"
        )
    if not reads_text:
        return
    if config.data.name == "prompts" and config.evaluation.every:
        raise ConfigError(
            "config.evaluation.every must be 0 with config.data.name = 'prompts', got "
            f"{config.evaluation.every}; look at checkpoints with --mode=sample"
        )
    axes = model.rope_axes
    if len(axes) != 3 or sum(axes) * model.num_heads != model.hidden or any(a % 2 for a in axes):
        raise ConfigError(
            "config.model.rope_axes must be three even numbers that add up to config.model.hidden "
            f"/ config.model.num_heads ({model.hidden} / {model.num_heads}), got {axes}"
        )
    for stage in ("teacher", "train"):
        if getattr(config, stage).optimizer.kind == "muon":
            raise ConfigError(
                f"config.{stage}.optimizer.kind = 'muon' is for config.model.network = 'dit'; "
                "give 'adamw'"
            )
