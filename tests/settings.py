"""Configurations with some values changed, and the sentences that refuse them."""

import ml_collections
import pytest

from piflow_jax.config import ConfigError, base_config, parse
from piflow_jax.systems.settings import check_choices


def changed(**values):
    """The base configuration with values at dotted keys (`__` for the dot), types unchecked."""
    config = base_config().to_dict()
    for key, value in values.items():
        *groups, name = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[name] = value
    return ml_collections.ConfigDict(config)


def refusal(num_devices=1, **values):
    with pytest.raises(ConfigError) as error:
        check_choices(parse(changed(**values), num_devices))
    return str(error.value)
