"""Turns a `ConfigDict` into the frozen schema, or refuses it with key and allowed values."""

import contextlib
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ml_collections

from piflow_jax import hub
from piflow_jax.arguments import prefixed
from piflow_jax.buckets import located
from piflow_jax.config.networks import ModelConfig, NetworkConfig
from piflow_jax.config.schema import Config

# Rows of the tiles in which a TPU keeps matrices, whatever their type.
_TILE_ROWS = 8
# The largest integer that JAX counts with.
_LARGEST = 2**31 - 1
# Range of the normal numbers of float32.
_TINIEST, _HIGHEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
# A message shows this many characters of a value.
_LONGEST = 200
# Words with at least this share of letters in common count as similar.
_ALIKE = 0.6
# The largest number of parts of a parameter by default; a power of two.
_MOST_PARTS = 16


class ConfigError(ValueError):
    """A configuration names an unknown key, a wrong type or an impossible value."""


def naming(what: str, *errors: type[Exception]) -> contextlib.AbstractContextManager[None]:
    """Names what a user can change in errors about it.

    Args:
      what: The key, perhaps with its value.
      *errors: Further errors than `ImportError` and `ValueError`.

    Raises:
      ConfigError: In place of these errors.
    """
    return prefixed(what, (ImportError, ValueError, *errors), ConfigError)


def base_config() -> ml_collections.ConfigDict:
    """A configuration with every key at its default, to be changed by a config file."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def parse(
    config: ml_collections.ConfigDict | Mapping[str, Any], num_devices: int | None = 1
) -> Config:
    """Checks a configuration and freezes it.

    Args:
      config: the configuration of a config file, with the changes of flags.
      num_devices: devices of all processes; with None, `check_devices` checks them later.

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
      cls: the dataclass. If its fields have metadata, it is that of the schema.
      values: plain values by key, as in a `ConfigDict` or JSON; lists count as tuples.
      name: of the group, such as `config.train`, for messages.
      complete: whether every key must be present; otherwise missing keys get their default.

    Returns:
      An instance of the dataclass.

    Raises:
      ConfigError: on an unknown or missing key, a wrong type or a value out of range.
    """
    return _check_group(cls, values, name, complete, key_types(cls, name))


def _check_group(cls: type, values: Any, name: str, complete: bool, types: dict[str, Any]) -> Any:
    if not isinstance(values, ml_collections.ConfigDict | Mapping):
        raise ConfigError(f"{name} must be a group of keys, got {values!r}")
    fields = {f"{name}.{field.name}": field for field in dataclasses.fields(cls)}
    for key in values:
        if f"{name}.{key}" not in fields:
            raise unknown_key(f"{name}.{key}", types)
    checked = {}
    for key, field in fields.items():
        if field.name not in values:
            if complete or _has_no_default(field):
                doc = field.metadata.get("doc") or types[key].__name__
                raise ConfigError(f"missing key {key} ({doc})")
            continue
        value = values[field.name]
        if dataclasses.is_dataclass(types[key]):
            value = _check_group(types[key], value, key, complete, types)
        else:
            value = _parse_value(value, types[key], field.metadata, key)
        checked[field.name] = value
    return cls(**checked)


def key_types(cls: type, name: str) -> dict[str, Any]:
    """Types by dotted key, of a group's keys and of the keys of the groups inside it."""
    types, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{name}.{field.name}", hints[field.name]
        types[key] = hint
        if dataclasses.is_dataclass(hint):
            types |= key_types(hint, key)
    return types


def unknown_key(key: str, known: Collection[str]) -> ConfigError:
    """The message for an unknown dotted key: the most similar one, and all keys of its group."""
    group = key
    while group and not any(other.startswith(f"{group}.") for other in known):
        group = group.rpartition(".")[0]
    names = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == group]
    return ConfigError(f"unknown key {key}; {group} has {', '.join(names)}{nearest(key, known)}")


def check_variant(variant: str, variants: Collection[str]) -> None:
    """Raises ConfigError if a config file has no such variant."""
    if variant not in variants:
        raise ConfigError(
            f"there are the variants {', '.join(variants)}, not {variant!r}"
            f"{nearest(variant, variants)}"
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the most similar known word, or nothing if none is similar.

    Dotted keys are similar if their last names are, or if only the dots are wrong. Among several,
    the one in the most similar group is chosen.
    """

    def likeness(other: str) -> tuple[float, float]:
        last, whole = (
            difflib.SequenceMatcher(None, *pair).ratio()
            for pair in ((word.rpartition(".")[2], other.rpartition(".")[2]), (word, other))
        )
        same = word.replace(".", "_") == other.replace(".", "_")
        return max(last, float(same)), whole

    best = max(known, key=likeness, default="")
    return f"; did you mean {best}?" if best and likeness(best)[0] >= _ALIKE else ""


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _parse_value(value: Any, hint: Any, allowed: types.MappingProxyType, key: str) -> Any:
    if isinstance(hint, types.UnionType):  # one value, or several
        several = isinstance(value, tuple | list)
        arms = {typing.get_origin(arm) is tuple: arm for arm in typing.get_args(hint)}
        hint = arms[several]
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{key} must be a tuple, got {_shown(value)}")
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise ConfigError(f"{key} must have {len(items)} entries, got {_shown(value)}")
        if not value and not allowed.get("may_be_empty"):
            raise ConfigError(f"{key} must not be empty")
        entries = tuple(_parse_value(entry, items[0], allowed, key) for entry in value)
        if allowed.get("distinct") and len(set(entries)) < len(entries):
            raise ConfigError(f"{key} must not hold a value twice, got {_shown(entries)}")
        return entries
    if not isinstance(value, (int, float) if hint is float else hint) or (
        isinstance(value, bool) and hint is not bool
    ):
        raise ConfigError(f"{key} must be of type {hint.__name__}, got {_shown(value)}")
    if value is None:
        return None
    if hint is float:
        value = _float(value, key)
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{key} must have no NUL character, got {_shown(value)}")
    if isinstance(value, str):
        value = os.path.expanduser(value)  # shells leave the ~ of --key=~/path as it is
        named = hub.is_name(value)
        if named and allowed.get("hub") is None:
            raise ConfigError(f"{key} takes no name on the Hugging Face hub, got {_shown(value)}")
        try:
            hub.check(value) if named else located(value)
        except ValueError as error:
            raise ConfigError(f"{key} = {error}") from None
    low, high, above, choices = (allowed.get(name) for name in ("low", "high", "above", "choices"))
    if choices is not None and value not in choices:
        known = ", ".join(map(repr, choices))
        raise ConfigError(f"{key} must be one of {known}, got {_shown(value)}")
    if above is not None and not value > above:
        raise ConfigError(f"{key} must be above {above}, got {_shown(value)}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ConfigError(f"{key} must be {bounds}, got {_shown(value)}")
    most = allowed.get("most") or (_LARGEST if hint is int else None)
    if most is not None and value > most:
        raise ConfigError(f"{key} must be at most {most:,}, got {_shown(value)}")
    return value


def _float(value: float, key: str) -> float:
    """A number that float32, in which everything is computed, can represent."""
    try:
        value = float(value)
    except OverflowError:  # of a whole number
        value = math.inf
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {value}")
    if value and not _TINIEST <= abs(value) <= _HIGHEST:
        raise ConfigError(f"{key} must be a number of float32, got {value}")
    return value


def _shown(value: Any) -> str:
    """A value for a message: its Python form, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # of a whole number with thousands of digits
        return f"{type(value).__name__} of more digits than can be shown"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def mesh_sizes(config: Config, num_devices: int, num_slices: int = 1) -> dict[str, int]:
    """Sizes of the mesh's axes in their order, with -1 filled in.

    Args:
      config: the parsed configuration.
      num_devices: devices of all processes.
      num_slices: TPU slices to which the devices belong.

    Returns:
      `data`, `fsdp` and `tensor`, whose product is the number of devices.

    Raises:
      ConfigError: a size is 0, more than one is -1 (except `data` with `fsdp`), they do not
        multiply to that number, or the slices do not divide `data`.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    for axis, size in sizes.items():
        if size == 0:
            raise ConfigError(f"config.mesh.{axis} must be at least 1, or -1 to fill, got 0")
    if sizes["data"] == sizes["fsdp"] == -1 and sizes["tensor"] > 0:
        # Parts smaller than a tile are padded, and many parts save little more memory. For groups
        # as large as a slice, the compiler makes worse programs (docs/scaling.md).
        widths = dict(config.model.own.shared_widths())
        tiles, rest = divmod(widths.pop("hidden", 1), _TILE_ROWS)
        room = max(num_devices // (sizes["tensor"] * num_slices), 1)
        most = math.gcd(room, tiles, _MOST_PARTS, *widths.values())
        sizes["fsdp"] = 1 if rest else most
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ConfigError(
            "only one size of config.mesh may be -1, or data and fsdp, but "
            f"{' and '.join(f'config.mesh.{axis}' for axis in open_axes)} are"
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


def check_devices(
    config: Config,
    num_devices: int,
    num_processes: int = 1,
    num_slices: int = 1,
    groups: Collection[str] | None = None,
) -> dict[str, int]:
    """Refuses a mesh or batches that do not fit the devices.

    Args:
      config: the parsed configuration.
      num_devices: devices of all processes.
      num_processes: number of processes. Each samples on its own devices.
      num_slices: see `mesh_sizes`.
      groups: those of `train`, `teacher` and `evaluation` whose batches are used; by default those
        of training.

    Returns:
      Sizes of the mesh's axes, see `mesh_sizes`.

    Raises:
      ConfigError: the mesh does not fit, or a batch cannot be divided; names the key.
    """
    train, own = config.train, config.model.own
    group = f"config.model.{config.model.network}"
    sizes = mesh_sizes(config, num_devices, num_slices)
    heads = getattr(own, "num_heads", sizes["tensor"])
    if heads % sizes["tensor"]:
        raise ConfigError(
            f"config.mesh.tensor ({sizes['tensor']}) must divide {group}.num_heads ({heads})"
        )
    for key, size in own.shared_widths().items():
        if size % sizes["fsdp"]:
            raise ConfigError(
                f"config.mesh.fsdp ({sizes['fsdp']}) must divide {group}.{key} ({size})"
            )
    parts = sizes["data"] * sizes["fsdp"]
    # Devices that hold a network together share each sample.
    samplers = num_devices // num_processes if own.whole else parts
    groups = ("train", "teacher", "evaluation") if groups is None else groups
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
        microbatches = getattr(getattr(config, group), "microbatches", 1)
        if batch % (microbatches * over):
            raise ConfigError(
                f"config.{group}.microbatches times the {over} devices that share a batch must "
                f"divide config.{key} ({batch}), got {microbatches}"
            )
    return sizes


def _check_together(config: Config) -> None:
    """Refuses values that are possible alone and contradict each other."""
    model, train, teacher = config.model, config.train, config.teacher
    _check_other_networks(model)
    group = f"config.model.{model.network}"
    problem = model.own.check(group)
    if problem is not None:
        raise ConfigError(problem)
    depth = getattr(model.own, "depth", model.scan_unroll)
    if model.scan_unroll > depth:
        raise ConfigError(
            f"config.model.scan_unroll must be in [1, {group}.depth = {depth}], "
            f"got {model.scan_unroll}"
        )
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
    scales = teacher.guidance_range
    if scales and not (len(scales) == 2 and scales[0] < scales[1]):
        raise ConfigError(
            f"config.teacher.guidance_range must be empty or (low, high) with low < high, "
            f"got {scales}"
        )
    if scales and not scales[0] <= teacher.guidance_scale <= scales[1]:
        raise ConfigError(
            f"config.teacher.guidance_scale is the default of sampling and must be in "
            f"config.teacher.guidance_range {scales}, got {teacher.guidance_scale}"
        )
    ranged = f", config.teacher.guidance_range {scales}" if scales else ""
    if (
        (scales or teacher.guidance_scale > 1)
        and teacher.label_dropout == 0
        and not (teacher.checkpoint or teacher.weights)
    ):
        raise ConfigError(
            "config.teacher.label_dropout must be above 0 to train a teacher for guidance "
            f"(config.teacher.guidance_scale is {teacher.guidance_scale}{ranged})"
        )
    optimizers = [("teacher", teacher.optimizer, "teacher"), ("train", train.optimizer, "train")]
    if train.corrector.kind:
        optimizers.append(("train.corrector", train.corrector.optimizer, "train"))
    for group, optimizer, stage in optimizers:
        steps = getattr(config, stage).steps
        if optimizer.decay != "constant" and optimizer.warmup_steps >= steps:
            raise ConfigError(
                f"config.{group}.optimizer.warmup_steps must be below config.{stage}.steps "
                f"({steps}) for a schedule that decays, got {optimizer.warmup_steps}"
            )


def _check_other_networks(model: ModelConfig) -> None:
    """Refuses changed settings of networks that are not chosen."""
    groups = {key: own for key, own in vars(model).items() if isinstance(own, NetworkConfig)}
    others = {key: own for key, own in groups.items() if own is not model.own}
    if len(others) == len(groups) and ":" not in model.network:
        return  # there is no such network, which is refused where they are known
    for network, own in others.items():
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            if value != field.default:
                raise ConfigError(
                    f"config.model.{network}.{field.name} is for config.model.network = "
                    f"{network!r} and must be {_shown(field.default)}, its default, with "
                    f"{model.network!r}, got {_shown(value)}"
                )
