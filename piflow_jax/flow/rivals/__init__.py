"""Other ways to few-step samplers, as objectives of networks that are passed in as functions.

Times are ours: `t = 1` is noise and `t = 0` data, whatever a paper has.
"""

from piflow_jax.flow.rivals.consistency import (
    consistency_loss,
    consistency_tangent,
    consistency_times,
    trigflow,
)
from piflow_jax.flow.rivals.distribution_matching import (
    backward_simulation,
    distribution_matching_loss,
)
from piflow_jax.flow.rivals.meanflow import guided_target, meanflow_loss, meanflow_times
from piflow_jax.flow.rivals.reflow import reflow_loss
from piflow_jax.flow.rivals.sampling import flow_map_sample, renoised_sample
from piflow_jax.flow.rivals.shortcut import shortcut_steps, shortcut_target

__all__ = [
    "backward_simulation",
    "consistency_loss",
    "consistency_tangent",
    "consistency_times",
    "distribution_matching_loss",
    "flow_map_sample",
    "guided_target",
    "meanflow_loss",
    "meanflow_times",
    "reflow_loss",
    "renoised_sample",
    "shortcut_steps",
    "shortcut_target",
    "trigflow",
]
