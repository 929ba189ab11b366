"""Where batches lie, on devices that are not here."""

import dataclasses

import jax
import numpy as np
import pytest

from piflow_jax.config import ConfigError, parse
from piflow_jax.parallel import config_mesh, device_mesh, global_batch, local_rows
from piflow_jax.parallel.mesh import batch_sharding
from tests import tiny


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh wants to know of a device."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "of a test"
    slice_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


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
    batch = {"x": np.arange(12.0, dtype=np.float32).reshape(4, 3), "condition": np.arange(4)}
    found = global_batch(batch, device_mesh(devices=jax.devices()[:1]))
    for name, values in batch.items():
        np.testing.assert_array_equal(found[name], values)


def gpus(hosts):
    """Four on each host, which JAX numbers as slices."""
    return [Device(i, i // 4, "gpu", slice_index=i // 4) for i in range(4 * hosts)]


def tpus(slices):
    """Slices of 2 x 4."""
    return [
        Device(8 * index + 4 * x + y, index, "tpu", "TPU v5 lite", index, (x, y, 0))
        for index in range(slices)
        for x in range(2)
        for y in range(4)
    ]


def settings(hidden=384, **sizes):
    config = tiny.get_config()
    config.model.dit.hidden, config.model.dit.num_heads = hidden, 8
    for axis, size in sizes.items():
        config.mesh[axis] = size
    return parse(config, None)


OPEN = {"data": -1, "fsdp": -1}


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        # Parts of a state may lie on several hosts of GPUs,
        ({"data": 1, "fsdp": 8}, gpus(2), (1, 8, 1)),
        ({"data": 1, "fsdp": -1}, gpus(3), (1, 12, 1)),
        (OPEN, gpus(4), (1, 16, 1)),
        (OPEN | {"tensor": 2}, gpus(2), (1, 4, 2)),
        # and on one slice of TPUs.
        (OPEN, tpus(1), (1, 8, 1)),
        (OPEN, tpus(2), (2, 8, 1)),
        (OPEN | {"tensor": 8}, tpus(2), (2, 1, 8)),
        ({}, tpus(3), (24, 1, 1)),
    ],
)
def test_slices_of_tpus_have_their_own_parts_of_data_and_hosts_of_gpus_need_not(
    sizes, devices, shape
):
    mesh = config_mesh(settings(**sizes), devices)
    assert mesh.devices.shape == shape
    assert sorted(d.id for d in mesh.devices.flat) == list(range(len(devices)))
    if devices[0].platform == "gpu":
        # Neighbours share a host.
        assert [d.id for d in mesh.devices.flat] == list(range(len(devices)))
        return
    slices = len({d.slice_index for d in devices})
    for index, part in enumerate(np.split(mesh.devices, slices)):
        assert {d.slice_index for d in part.flat} == {index}


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 16}, OPEN | {"tensor": 16}], ids=str)
def test_a_state_larger_than_a_slice_is_refused_with_the_remedy(sizes):
    fsdp, tensor = sizes["fsdp"] if sizes["fsdp"] > 0 else 1, sizes.get("tensor", 1)
    with pytest.raises(ConfigError) as error:
        config_mesh(settings(**sizes), tpus(2))
    assert str(error.value) == (
        "config.mesh.data (1) must be divisible by the 2 slices; "
        f"lower config.mesh.fsdp ({fsdp}) or config.mesh.tensor ({tensor}) "
        "until their product divides the 8 devices of a slice"
    )
    with pytest.raises(ValueError, match=r"data \(1\) must be divisible by the 2 slices"):
        device_mesh(1, fsdp, tensor, devices=tpus(2))
