"""Where batches lie, on devices that are not here."""

import dataclasses

import jax
import numpy as np
import pytest

from piflow_jax.parallel import device_mesh, global_batch, local_rows
from piflow_jax.parallel.mesh import batch_sharding


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh wants to know of a device."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "of a test"
    slice_index: int = 0


def devices_of(processes):
    """One device for each entry, which is its process."""
    return [Device(index, process) for index, process in enumerate(processes)]


@pytest.mark.parametrize(
    ("processes", "shape", "rows"),
    [
        ((0, 1), (2, 1, 1), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((0, 0, 1, 1), (2, 2, 1), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        # Halves of the heads, each with all examples.
        ((0, 1), (1, 1, 2), [range(8)] * 2),
        ((0, 1, 2, 3), (1, 2, 2), [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2),
        ((0, 0, 1, 1), (1, 2, 2), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((0, 0, 1, 1), (1, 1, 4), [range(8)] * 2),
        # Hosts of two columns in a grid of devices that is read by rows.
        ((0, 0, 1, 1, 0, 0, 1, 1), (8, 1, 1), [(0, 1, 4, 5), (2, 3, 6, 7)]),
    ],
    ids=str,
)
def test_a_process_reads_the_rows_that_its_devices_hold(processes, shape, rows):
    mesh = device_mesh(*shape, devices=devices_of(processes))
    for process, expected in enumerate(rows):
        found = local_rows(mesh, 8, process)
        np.testing.assert_array_equal(found, list(expected))
        # As JAX lays the batch out.
        held = batch_sharding(mesh).devices_indices_map((8,))
        parts = [np.arange(8)[part] for d, part in held.items() if d.process_index == process]
        np.testing.assert_array_equal(found, np.unique(np.concatenate(parts)))


def test_a_batch_of_all_rows_is_put_as_it_is():
    batch = {"image": np.arange(12.0, dtype=np.float32).reshape(4, 3), "label": np.arange(4)}
    found = global_batch(batch, device_mesh(devices=jax.devices()[:1]))
    for name, values in batch.items():
        np.testing.assert_array_equal(found[name], values)
