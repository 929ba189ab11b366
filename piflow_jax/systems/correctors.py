"""The table of correctors: what each takes of the settings, and what it needs of the data.

How they train is in `piflow_jax.training.corrector`.
"""

import dataclasses
from fractions import Fraction

from piflow_jax.config import Config, ConfigError, CorrectorConfig
from piflow_jax.systems.datasets import dataset

_OF_FEATURES = frozenset({"space", "population"})
_OF_CRITIC = frozenset({"critic_steps", "optimizer"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectorKind:
    """A row of `CORRECTOR_KINDS`.

    Attributes:
      one_policy: it follows one policy from noise to data.
      of_data: it compares samples with the training data, in a feature space of pictures.
      lacks: settings of `config.train.corrector` that it does not have.
    """

    one_policy: bool = False
    of_data: bool = False
    lacks: frozenset[str] = _OF_FEATURES


CORRECTOR_KINDS: dict[str, CorrectorKind] = {
    "critic": CorrectorKind(),
    "policy": CorrectorKind(one_policy=True, lacks=_OF_FEATURES | _OF_CRITIC),
    "frechet": CorrectorKind(
        of_data=True, lacks=_OF_CRITIC | {"levels", "shift", "guidance_interval"}
    ),
}


def corrector_kind(config: Config) -> CorrectorKind | None:
    """The row of a run's corrector; None without one."""
    kind = config.train.corrector.kind
    return CORRECTOR_KINDS[kind] if kind else None


def check_corrector(config: Config) -> None:
    """Refuses a corrector that does not go with the rest.

    Args:
      config: a parsed configuration.

    Raises:
      ConfigError: the message names the key and the remedy.
    """
    train, corrector, row = config.train, config.train.corrector, corrector_kind(config)
    if row is None:
        return
    group = "config.train.corrector"
    if row.one_policy and train.nfe > 1:
        raise ConfigError(
            f"{group}.kind = {corrector.kind!r} follows one policy from noise to data and needs "
            f"config.train.nfe = 1, got {train.nfe}; give 'critic'"
        )
    for name in sorted(row.lacks):
        if getattr(corrector, name) != getattr(CorrectorConfig(), name):
            having = [repr(kind) for kind, it in CORRECTOR_KINDS.items() if name not in it.lacks]
            raise ConfigError(
                f"{group}.{name} is for {group}.kind = {' or '.join(having)} and must be its "
                f"default with {corrector.kind!r}"
            )
    if row.of_data and dataset(config).latents:
        raise ConfigError(
            f"{group}.kind = {corrector.kind!r} measures pictures, but the states of "
            f"config.data.name = {config.data.name!r} are latents; give 'critic'"
        )
    share = Fraction(corrector.share).limit_denominator(train.batch_size)
    if not 0 < share < 1:
        raise ConfigError(
            f"{group}.share = {corrector.share:g} leaves the corrector or pi-ID without examples "
            f"with config.train.batch_size = {train.batch_size}: raise the batch size"
        )
    parts = share.denominator * train.microbatches
    if train.batch_size % parts:
        raise ConfigError(
            f"{group}.share = {corrector.share:g} is {share} of a batch, so "
            f"config.train.batch_size must be divisible by {parts}, got {train.batch_size}"
        )
    if row.of_data and not corrector.start:
        raise ConfigError(
            f"{group}.start must be at least 1 with {group}.kind = {corrector.kind!r}, which first "
            "has to see samples"
        )
    interval = corrector.guidance_interval
    if interval and (len(interval) != 2 or interval[0] > interval[1]):
        raise ConfigError(
            f"{group}.guidance_interval must be empty or (low, high) with low <= high, got "
            f"{interval}"
        )
    if interval and config.teacher.guidance_scale == 1:
        raise ConfigError(
            f"{group}.guidance_interval is for a teacher with guidance and must be empty with "
            "config.teacher.guidance_scale = 1"
        )
    low, high = corrector.levels
    if low >= high:
        raise ConfigError(f"{group}.levels must be (low, high) with low < high, got {low, high}")
