"""Teacher and student of a run as values, before their weights."""

import dataclasses

from piflow_jax.config import Config, TeacherConfig
from piflow_jax.flow.teacher import Teacher
from piflow_jax.models.dit import Constrain
from piflow_jax.systems.conditioning import Condition
from piflow_jax.systems.networks import Network, student_network, teacher_network
from piflow_jax.systems.shapes import DataShape

__all__ = ["Systems", "guided"]


def guided(network: Network, settings: TeacherConfig, null: Condition | None) -> Teacher:
    """A network that predicts velocities as a teacher, guided as the settings say.

    Args:
      network: the network.
      settings: guidance scale, interval and orthogonal share.
      null: the condition that stands for none, of a single example.

    Returns:
      The teacher; its parameters are the network's variables.
    """
    return Teacher(
        predict=network.apply,
        shape=None,
        guidance_scale=settings.guidance_scale,
        guidance_interval=settings.guidance_interval,
        orthogonal_guidance=settings.orthogonal_guidance,
        null_cond=null if settings.guidance_scale != 1 else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Systems:
    """Teacher and student of a run.

    Attributes:
      config: the run's settings.
      data: what networks know of the data.
      teacher_network: predicts velocities.
      student_network: predicts policies.
      null: the condition that stands for none; of captions None where the set is not open.
    """

    config: Config
    data: DataShape
    teacher_network: Network
    student_network: Network
    null: Condition | None

    @classmethod
    def of(
        cls,
        config: Config,
        data: DataShape,
        caption: Condition | None = None,
        constrain: Constrain | None = None,
    ) -> "Systems":
        """The systems of a configuration.

        Args:
          config: the run's settings.
          data: what networks know of the data.
          caption: the empty caption of a set of captions; needed for guidance only.
          constrain: pins activations to a mesh, for parameters that are split.

        Returns:
          The systems.
        """
        networks = (
            teacher_network(config.model, data),
            student_network(config.model, config.policy, data),
        )
        if constrain is not None:
            networks = tuple(network.constrained(constrain) for network in networks)
        return cls(
            config=config,
            data=data,
            teacher_network=networks[0],
            student_network=networks[1],
            null=networks[0].conditioning.null(data, caption),
        )

    @property
    def teacher(self) -> Teacher:
        """The teacher with its guidance."""
        return guided(self.teacher_network, self.config.teacher, self.null)
