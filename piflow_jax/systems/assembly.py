"""Teacher and student of a run as values, before their weights, and how they sample."""

import dataclasses

from piflow_jax.config import Config, TeacherConfig
from piflow_jax.evaluation.evaluator import Sampler
from piflow_jax.flow.sampling import ode_sample
from piflow_jax.flow.schedule import TimeWarp, sampling_times
from piflow_jax.flow.teacher import Teacher
from piflow_jax.models.blocks import Constrain
from piflow_jax.systems.conditioning import Condition
from piflow_jax.systems.networks import Network, student_network, teacher_network
from piflow_jax.systems.sampling import student_sampler
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

    def teacher_sampler(self, steps: int) -> Sampler:
        """The guided teacher's Euler sampler, `(params, noise[B, *sites, C], condition) -> x_0`."""
        teacher, warp = self.teacher, TimeWarp(self.config.train.shift)
        return lambda params, noise, condition: ode_sample(
            teacher.bind(params, condition), noise, steps, warp
        )

    def student_sampler(self) -> Sampler:
        """The student's sampler, at its trained NFE or that of `config.evaluation.nfe`."""
        train, settings = self.config.train, self.config.evaluation
        sample = student_sampler(
            self.student_network,
            self.config.policy,
            train,
            substeps=settings.substeps,
            solver=settings.solver,
        )
        warp = TimeWarp(train.shift)
        times = sampling_times(self.config.sampling_nfe, warp, train.final_step_size_scale)
        return lambda params, noise, condition: sample(
            params, noise, condition, times, settings.temperature
        )

    def sampler(self) -> Sampler:
        """That of `config.evaluation.system`, a teacher's at the most of its `teacher_steps`."""
        if self.config.evaluation.system == "student":
            return self.student_sampler()
        return self.teacher_sampler(self.config.evaluation.teacher_steps[-1])
