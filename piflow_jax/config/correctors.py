"""The schema of correctors, of which a run has one or none."""

import dataclasses

from piflow_jax.config.fields import config_field as _field
from piflow_jax.config.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectorConfig:
    """The corrector, which moves the distribution of samples to the teacher's or to the data's."""

    kind: str = _field(
        "",
        "what is compared: the teacher's velocity with that of the student's distribution, from a "
        "second network that learns it (critic) or from the policy itself (policy), or features of "
        "samples with those of training data (frechet, pictures only). Empty means no corrector",
        choices=("", "critic", "policy", "frechet"),
    )
    share: float = _field(
        0.25, "share of the batch that the corrector takes; pi-ID has the rest", low=0.01, high=0.9
    )
    scale: float = _field(
        1.0, "norm of the corrector's gradient, relative to pi-ID's", above=0, most=100
    )
    start: int = _field(
        100,
        "steps before the corrector acts; the critic learns in them, and frechet sees samples",
        low=0,
    )
    levels: tuple[float, float] = _field(
        (0.02, 0.98), "lowest and highest noise level of the states", low=1e-3, high=0.999
    )
    shift: float = _field(1.0, "shift of these levels towards noise", above=0, low=1e-3, most=1e3)
    substeps: int = _field(
        8, "policy substeps per unit of raw time in the rollout of samples", low=1, most=1024
    )
    guidance_interval: tuple[float, ...] = _field(
        (),
        "noise levels at which the corrector's teacher is guided; empty means those of teacher",
        may_be_empty=True,
        low=0,
        high=1,
    )
    critic_steps: int = _field(1, "updates of the critic per step", low=1, most=100)
    optimizer: OptimizerConfig = _field(OptimizerConfig, "")
    space: str = _field(
        "network",
        "feature space of frechet: a network that is trained for this alone (network), the space "
        "of the report's figures (judge), or principal components (pixels)",
        choices=("network", "judge", "pixels"),
    )
    population: int = _field(
        50_000, "latest samples that frechet takes the student's mean and covariance over", low=2
    )
