"""Teacher and student of a run, without their weights, and their samplers."""

import dataclasses

from piflow_jax.config import Config, ConfigError, TeacherConfig
from piflow_jax.evaluation.evaluator import Sampler
from piflow_jax.flow.guidance import Null
from piflow_jax.flow.teacher import Teacher
from piflow_jax.models.blocks import Constrain
from piflow_jax.systems.conditioning import Condition
from piflow_jax.systems.network import Network
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.sampling import (
    sampling_guidance,
    student_sampler,
    student_times,
    teacher_sampler,
)
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spaces import Space


def guided(network: Network, settings: TeacherConfig, null: Null | None) -> Teacher | None:
    """Makes a teacher of a network that predicts velocities, with the guidance in the settings.

    Args:
      network: the network.
      settings: guidance scale, interval and orthogonal share.
      null: the null condition, see `Conditioning.null`.

    Returns:
      The teacher; its parameters are the network's variables. None if it is guided but has no null
      condition.
    """
    is_guided = settings.guidance_scale != 1 or settings.guidance_range
    if is_guided and null is None:
        return None
    return Teacher(
        predict=network.apply,
        shape=None,
        guidance_scale=settings.guidance_scale,
        guidance_interval=settings.guidance_interval,
        orthogonal_guidance=settings.orthogonal_guidance,
        null_cond=null if is_guided else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Systems:
    """Teacher and student of a run.

    Attributes:
      config: the run's settings.
      data: shape and conditions of the data.
      teacher: the teacher with its guidance; None if it is guided but has no null condition.
      student_network: the network that predicts policies.
      teacher_network: the teacher's network, if it is one of ours or is to be trained here.
      null: the null condition; None for captions whose set has not been opened.
      space: the feature space in which a corrector compares samples with the data, where it has
        been opened; see `open_space`.
    """

    config: Config
    data: DataShape
    teacher: Teacher | None
    student_network: Network | None
    teacher_network: Network | None = None
    null: Null | None = None
    space: Space | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        data: DataShape,
        caption: Condition | None = None,
        constrain: Constrain | None = None,
    ) -> "Systems":
        """Builds the systems of a configuration.

        Args:
          config: the run's settings.
          data: shape and conditions of the data.
          caption: the empty caption of a set of captions; only guidance needs it.
          constrain: see `constrained`.

        Returns:
          The systems.

        Raises:
          ConfigError: the data has more reference images than the network takes.
        """
        network = teacher_network(config.model, data)
        taken = network.conditioning.references
        if data.references > taken:
            raise ConfigError(
                f"config.model.{config.model.network}.references is {taken}, but prompts of "
                f"{data.name!r} have up to {data.references} reference images: raise it, or give "
                "prompts without them"
            )
        null = network.conditioning.null(data, caption)
        systems = cls(
            config=config,
            data=data,
            teacher=guided(network, config.teacher, null),
            student_network=student_network(config.model, config.policy, data, config.teacher),
            teacher_network=network,
            null=null,
        )
        return systems if constrain is None else systems.constrained(constrain)

    def constrained(self, constrain: Constrain) -> "Systems":
        """The same systems with activations pinned to a mesh, for parameters that are split."""
        teacher, network, student = self.teacher, self.teacher_network, self.student_network
        if network is not None:
            network = network.constrained(constrain)
            teacher = guided(network, self.config.teacher, self.null)
        student = student and student.constrained(constrain)
        new = {"teacher": teacher, "teacher_network": network, "student_network": student}
        return dataclasses.replace(self, **new)

    def teacher_sampler(self, steps: int, solver: str | None = None) -> Sampler:
        """The guided teacher's sampler, `(params, noise[B, *sites, C], condition) -> x_0`.

        Args:
          steps: steps of the solver.
          solver: by default `config.evaluation.teacher_solver`.
        """
        solver = solver or self.config.evaluation.teacher_solver
        teacher = self.teacher
        if self.config.evaluation.guidance:
            scale = sampling_guidance(self.config)
            teacher = dataclasses.replace(teacher, guidance_scale=scale)
        return teacher_sampler(teacher, self.config.train.shift, steps, solver)

    def student_sampler(self, nfe: int | None = None) -> Sampler:
        """The student's sampler at `nfe` evaluations, by default at `config.sampling_nfe`."""
        train, settings = self.config.train, self.config.evaluation
        sample = student_sampler(
            self.student_network,
            self.config.policy,
            train,
            substeps=settings.substeps,
            solver=settings.solver,
        )
        times = student_times(train, nfe or self.config.sampling_nfe)
        guided, scale = self.student_network.conditioning.guided, settings.guidance or None
        return lambda params, noise, condition: sample(
            params, noise, guided(condition, scale), times, settings.temperature
        )

    def sampler(self) -> Sampler:
        """The sampler of `config.evaluation.system`; a teacher takes the last `teacher_steps`."""
        if self.config.evaluation.system == "student":
            return self.student_sampler()
        return self.teacher_sampler(self.config.evaluation.teacher_steps[-1])
