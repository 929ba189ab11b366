"""Names of classes in grids: the source's own, the table's, or numbers."""

import numpy as np
import pytest

from piflow_jax.data import ArraySource
from piflow_jax.distillation.grids import class_names
from piflow_jax.systems.shapes import DataShape

X, LABELS = np.zeros((4, 8, 8, 1), np.float32), np.arange(4, dtype=np.int32) % 2


@pytest.mark.parametrize(
    ("data", "classes", "own", "names"),
    [
        ("fashion_mnist", 10, None, ["T-shirt", "trouser", "pullover"]),
        ("digits", 10, None, ["0", "1", "2"]),
        ("mine", 2, ("cat", "dog"), ["cat", "dog"]),
        ("mine", 2, None, ["class 0", "class 1"]),
        ("mine", 0, None, []),
    ],
)
def test_classes_have_names(data, classes, own, names):
    source = ArraySource(
        name=data,
        x=X,
        condition=LABELS if classes else None,
        num_classes=classes,
        class_names=own,
    )
    shape = DataShape(name=data, sample_size=8, channels=1, num_classes=classes)
    assert class_names(source, shape)[:3] == names
    assert class_names(None, shape)[:3] == (
        names if own is None else [f"class {i}" for i in range(classes)]
    )
