"""Config files, and the words of a command line that override their keys."""

import ast
import glob
import inspect
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from piflow_jax.config.parsing import (
    ConfigError,
    base_config,
    key_types,
    nearest,
    unknown_key,
)
from piflow_jax.config.schema import Config

# `--config.key=value` or `--config.key value`; for a switch, `--config.key` or `--noconfig.key`.
_OVERRIDE = re.compile(r"--?(?P<no>no)?(?P<key>config\.[^=]*)(=(?P<text>.*))?", re.DOTALL)
# The module of a config file, by the name that dataclasses and pickle look it up.
_MODULE = "piflow_jax_config_file"


def load_config(name: str) -> ml_collections.ConfigDict:
    """Loads a config file and calls its function `get_config`.

    Args:
      name: the file's path, or the name of one that ships with the package, such as `digits`; a
        colon and a variant, the argument of `get_config`, may follow.

    Returns:
      The configuration.

    Raises:
      ConfigError: there is no such file or variant, or the file fails; the message has the line.
    """
    path, variant = _split(name)
    module = types.ModuleType(_MODULE)
    module.__file__ = path
    sys.modules[_MODULE] = module
    code = _run(path, lambda: compile(Path(path).read_bytes(), path, "exec", dont_inherit=True))
    _run(path, lambda: exec(code, vars(module)))
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"{path} is no config file: it has no function get_config")
    try:
        inspect.signature(get_config).bind(*variant)
    except TypeError as error:
        has = f"no variants, got {variant[0]!r}" if variant else f"variants, name one: {path}:..."
        raise ConfigError(f"{path} has {has}") from error
    config = _run(path, lambda: get_config(*variant))
    if not isinstance(config, ml_collections.ConfigDict | Mapping):
        raise ConfigError(
            f"{path}: get_config must return a ConfigDict such as that of "
            f"piflow_jax.config.base_config, got {config!r}"
        )
    return _run(path, lambda: ml_collections.ConfigDict(config))


def _split(name: str) -> tuple[str, tuple[str, ...]]:
    """The path of a config file, which may contain colons, and the variant after it, if any."""
    ends = [len(name), *(match.start() for match in re.finditer(":", name))]
    for end in ends:
        path = name[:end]
        if os.path.exists(path) and not os.path.isdir(path):
            return path, (name[end + 1 :],) if end < len(name) else ()
    path, *variant = name.split(":", 1)
    shipped = _shipped()
    if path in shipped:
        return shipped[path], tuple(variant)
    what = "is a directory" if os.path.isdir(path) else "does not exist or cannot be read"
    others = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.py"))
    there = [_stem(other) for other in others]
    if not os.path.dirname(path):
        there += shipped
    meant = nearest(_stem(path), there) or nearest(os.path.basename(_stem(path)), shipped)
    raise ConfigError(
        f"--config must name a config file, or one of {', '.join(shipped)}, which ship with the "
        f"package, but {path!r} {what}{meant}"
    )


def _shipped() -> dict[str, str]:
    """Paths of the config files that ship with the package, by name.

    They are `configs/` of a checkout, which a wheel has inside of the package.
    """
    package = Path(__file__).parents[1]
    places = (package / "configs", package.parent / "configs")
    found = next((files for place in places if (files := sorted(place.glob("*.py")))), [])
    return {path.stem: os.fspath(path) for path in found}


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _run(path: str, call: Callable[[], Any]) -> Any:
    """Runs a part of a config file; the message of a failure has the line."""
    try:
        return call()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines = [error.lineno]
        where = f"{path}, line {lines[-1]}" if lines else path
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"the config file fails: {where}: {reason}") from error


def override(
    config: ml_collections.ConfigDict, words: Iterable[str], known_flags: Iterable[str] = ()
) -> None:
    """Sets keys of a configuration from a command line; if a key is given twice, the last counts.

    A text that is no value of a key's type is set unchanged, and `parse` refuses it. If another
    network is chosen, the file's settings of its own network are dropped.

    Args:
      config: the configuration, which is changed.
      words: the command line without the program's name and without flags that are no keys.
      known_flags: names of these flags, to suggest one of them for an unknown word.

    Raises:
      ConfigError: a word is no override, its key is unknown, or lacks a value.
    """
    known, words, given = key_types(Config, "config"), iter(words), {}
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            flag = nearest(word.strip("-").partition("=")[0], known_flags)
            raise ConfigError(
                f"unexpected argument {word!r}; settings are --config.KEY=VALUE{flag}"
            )
        key, text = match["key"], match["text"]
        if key not in known:
            raise unknown_key(key, known)
        switch = known[key] is bool and text is None
        if match["no"] and not switch:
            raise ConfigError(f"{word} is no switch without a value; give --{key}=VALUE")
        text = str(not match["no"]) if switch else next(words, None) if text is None else text
        if text is None:
            raise ConfigError(f"--{key} has no value; give --{key}=VALUE")
        given[key] = _value(text, known[key])
    _leave_network(config, given.get("config.model.network"))
    for key, value in given.items():
        _set(config, key.split(".")[1:], value)


def _leave_network(config: ml_collections.ConfigDict, chosen: str | None) -> None:
    model, defaults = config.get("model"), base_config().model
    left = model.get("network") if isinstance(model, ml_collections.ConfigDict) else None
    if chosen is not None and chosen != left:
        own = defaults.get(left)
        if isinstance(own, ml_collections.ConfigDict):
            _set(model, [left], own)


def _set(config: ml_collections.ConfigDict, path: list[str], value: Any) -> None:
    with config.unlocked(), config.ignore_type():
        for group in path[:-1]:
            if not isinstance(config.get(group), ml_collections.ConfigDict):
                config[group] = ml_collections.ConfigDict()
            config = config[group]
        config[path[-1]] = value


def _tuple(text: str) -> tuple:
    """A literal, or words between commas."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return tuple(word.strip() for word in text.split(",") if word.strip())
    return tuple(value) if isinstance(value, tuple | list) else (value,)


_READERS = {
    str: str,
    bool: flags.BooleanParser().parse,
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    tuple: _tuple,
}


def _value(text: str, hint: Any) -> Any:
    """The value of a type that a text stands for, or the text if it stands for none."""
    read = _READERS.get(typing.get_origin(hint) or hint, ast.literal_eval)
    try:
        return read(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as literals may
        return text
