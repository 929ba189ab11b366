"""Systems side by side: the same noise, labels and features for all of them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from piflow_jax.config import Config
from piflow_jax.data import load_source
from piflow_jax.evaluation import (
    IndexSampler,
    Row,
    class_diversity,
    half_split_floor,
    index_labels,
    load_features,
    measure,
)
from piflow_jax.parallel import batch_sharding, local_mesh
from piflow_jax.stages.systems import told_by_class
from piflow_jax.training.networks import DataShape

__all__ = ["Bench"]


class Bench:
    """Samples systems of a data set that has a feature space, and measures them.

    Args:
      config: the run's settings.

    Attributes:
      data: what the data looks like.
      null: the example of an empty caption, of data with captions; None otherwise.
    """

    def __init__(self, config: Config):
        self._config, settings = config, config.evaluation
        self._source = load_source(config.data.name, config.data.data_dir or None)
        self.data = DataShape.of(config.data.name, self._source)
        self.null = getattr(self._source, "null", None)
        self._network = load_features(config.data.name)
        self._real = self._network.extract(self._source.images)
        self._labels = index_labels(settings.num_samples, self.data.num_classes)

    def sample(self, sampler: Callable, params) -> tuple[np.ndarray, float]:
        """A system's samples `[N, H, W, C]` and the seconds that they took."""
        settings = self._config.evaluation
        by_index = IndexSampler(
            told_by_class(self._config, self._source, sampler),
            shape=self._source.shape,
            classes=range(self.data.num_classes),
            batch_size=settings.batch_size,
            seed=settings.seed,
            sharding=batch_sharding(local_mesh()),
        )
        return by_index(params, settings.num_samples), by_index.seconds

    def row(
        self,
        system: str,
        nfe: int,
        samples: np.ndarray,
        seconds: float,
        reference: np.ndarray | None,
    ) -> Row:
        """Figures of samples; `reference` are the endpoints to compare with, if any."""
        mse = None if reference is None else float(np.mean(np.square(samples - reference)))
        return Row(
            system=system,
            nfe=nfe,
            figures=measure(samples, self._labels, self._real, self._network),
            endpoint_mse=mse,
            seconds=seconds,
        )

    def of_data(self) -> dict[str, Any]:
        """The real data's own diversity, and their half against half."""
        return {
            "data_diversity": class_diversity(self._real, self._source.labels),
            "floor": half_split_floor(self._real),
        }

    def protocol(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        config, settings = self._config, self._config.evaluation
        return {
            "data": self._source.name,
            "network": config.model.network,
            "real_images": len(self._source),
            "samples": settings.num_samples,
            "noise_seed": settings.seed,
            "labels": "index modulo classes",
            "features": self._network.name,
            "features_sha256": self._network.digest,
            "clipping": "samples clipped to [-1, 1] for features, not for endpoints",
            "weights": "EMA",
            "teacher_solver": "euler",
            "guidance": [config.teacher.guidance_scale, *config.teacher.guidance_interval],
            "substeps": settings.substeps,
            "solver": settings.solver,
            "temperature": settings.temperature,
            "checkpoint": settings.checkpoint,
            "dtype": config.model.dtype,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "seed": config.seed,
        }
