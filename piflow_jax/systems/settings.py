"""Checks of a configuration that depend on its choices, row by row of the tables."""

from piflow_jax.arguments import lora_strengths
from piflow_jax.config import Config, ConfigError, naming
from piflow_jax.models.quantized import check_qwix
from piflow_jax.systems.correctors import check_corrector
from piflow_jax.systems.datasets import DATASETS, dataset
from piflow_jax.systems.networks import check_takes_guidance, in_few_bits, network_kind
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.segments import shortest_segment


def check_choices(config: Config) -> None:
    """Refuses choices that do not fit together, and settings that a choice does not use.

    Args:
      config: a parsed configuration.

    Raises:
      ConfigError: the message names the key and the allowed values.
    """
    model, train, policy = config.model, config.train, config.policy
    kind, row, data = network_kind(model), POLICIES[policy.kind], dataset(config)
    if kind.conditioning(model.own).reads_text != data.captions:
        wanted = "captions" if kind.conditioning(model.own).reads_text else "classes"
        raise ConfigError(
            f"config.model.network = {model.network!r} needs a data set with {wanted} as "
            f"config.data.name, got {config.data.name!r}"
        )
    if not row.tempered and config.evaluation.temperature != 1:
        raise ConfigError(
            "config.evaluation.temperature belongs to a Gaussian mixture and must be 1 with "
            f"config.policy.kind = {policy.kind!r}, got {config.evaluation.temperature}"
        )
    if not data.by_class and config.evaluation.every:
        raise ConfigError(
            f"config.evaluation.every must be 0 with config.data.name = {config.data.name!r}, got "
            f"{config.evaluation.every}; look at checkpoints with --mode=sample"
        )
    for group in ("teacher", "evaluation"):
        loras = getattr(config, group).loras
        if loras and not config.teacher.weights:
            raise ConfigError(
                f"config.{group}.loras must be empty without config.teacher.weights, to which they "
                "are added; --mode=export writes those of a teacher that was trained here"
            )
        with naming(f"config.{group}.loras"):
            lora_strengths(loras)
    if config.evaluation.loras and kind.targets is None:
        raise ConfigError(
            "config.evaluation.loras must be empty with config.model.network = "
            f"{model.network!r}, whose students are not adapters of their teacher; "
            "config.teacher.loras distils them"
        )
    if in_few_bits(getattr(model.own, "base_dtype", None)):
        with naming(f"config.model.{model.network}.base_dtype = {model.own.base_dtype!r}"):
            check_qwix()
    if kind.official is None:
        for group in ("teacher", "evaluation"):
            if getattr(config, group).weights:
                raise ConfigError(
                    f"config.{group}.weights must be empty with config.model.network = "
                    f"{model.network!r}, for which there are no official weights"
                )
    trained = {"teacher": config.teacher, "train": train, "train.corrector": train.corrector}
    for group, settings in trained.items():
        scale = settings.optimizer.growth_rate_scale
        if scale != 1 and (settings is not train or kind.of_caller):
            raise ConfigError(
                f"config.{group}.optimizer.growth_rate_scale is for the output layer of this "
                f"package's students and must be 1 here, got {scale}"
            )
        if not model.own.blocks and settings.optimizer.kind == "muon":
            raise ConfigError(
                f"config.{group}.optimizer.kind = 'muon' is for the matrices of a DiT's blocks, "
                f"not for config.model.network = {model.network!r}; give 'adamw'"
            )
    for key in sorted(frozenset().union(*(row.uses for row in DATASETS.values()))):
        group, _, name = key.partition(".")
        value = getattr(getattr(config, group), name)
        if value and key not in data.uses:
            of = " or ".join(repr(name) for name, row in DATASETS.items() if key in row.uses)
            raise ConfigError(
                f"config.{key} is for config.data.name = {of} and must be empty with "
                f"{config.data.name!r}, got {value!r}"
            )
    room = max(round(shortest_segment(train) * train.total_substeps), 1)
    if train.window_substeps > room:
        raise ConfigError(
            f"config.train.window_substeps must be in [0, {room}], the substeps of the shortest "
            f"segment, got {train.window_substeps}"
        )
    if train.state_power and train.mixing_steps:
        raise ConfigError(
            "config.train.state_power is for states on the student's own path: set it to 0, or "
            f"config.train.mixing_steps, got {train.mixing_steps}"
        )
    if train.nfe_choices and train.nfe not in train.nfe_choices:
        raise ConfigError(
            f"config.train.nfe_choices must contain config.train.nfe ({train.nfe}), which is the "
            f"default of sampling, got {train.nfe_choices}"
        )
    if train.nfe_choices and train.data_free:
        raise ConfigError(
            "config.train.nfe_choices is for training with data, as a path without data has one "
            "number of segments: leave it empty, or set config.train.data_free = False"
        )
    if config.teacher.guidance_range:
        check_takes_guidance(model)
        if train.corrector.kind:
            raise ConfigError(
                "config.train.corrector.kind must be empty with config.teacher.guidance_range, as "
                f"a corrector knows one guidance scale, got {train.corrector.kind!r}"
            )
    elif config.evaluation.guidance:
        raise ConfigError(
            "config.evaluation.guidance is for a student with config.teacher.guidance_range, whose "
            "guidance is an input: leave it at 0"
        )
    check_corrector(config)
    row.check(config)


def check_ours(config: Config, mode: str) -> None:
    """Refuses a user's own network in a mode that works only with networks of this package.

    Args:
      config: the run's settings.
      mode: the mode, for the error.

    Raises:
      ConfigError: the network comes from a function.
    """
    if network_kind(config.model).official is None:
        raise ConfigError(
            f"{mode} is for networks of this package, not for config.model.network = "
            f"{config.model.network!r}"
        )
