"""Devices that are not here: TPU slices to compile for ahead of time."""

import dataclasses
import os

__all__ = ["CHIPS", "Chip", "topology_devices"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most, as its maker says.

    Attributes:
      memory: bytes of high-bandwidth memory.
      flops: bfloat16 operations per second.
    """

    memory: int
    flops: float


# By the part of a topology's name before the colon. A v5p and a v6e device is one chip.
CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12),
    "v5p": Chip(95 * 2**30, 459e12),
    "v6e": Chip(32 * 2**30, 918e12),
}


def topology_devices(topology: str) -> list:
    """The devices of a slice that need not be attached.

    Args:
      topology: such as `v5e:4x4`, `v5p:2x2x1` or `v6e:2x4`.

    Returns:
      The devices, for `device_mesh`; programs can be lowered and compiled for them, not run.

    Raises:
      ValueError: the name is not one that `libtpu` knows, or `libtpu` is not installed.
    """
    from jax.experimental import topologies  # loads libtpu

    if topology.split(":")[0] not in CHIPS:
        raise ValueError(
            f"unknown topology {topology!r}; it is a chip ({', '.join(CHIPS)}), a colon and the "
            "slice's shape, such as v5e:4x4"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # not on a TPU VM: there is no metadata
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # jax raises its own runtime errors here, of no common class
        raise ValueError(
            f"cannot make the topology {topology!r}: {error}. "
            'Compiling for TPUs needs libtpu: pip install -e ".[tpu]"'
        ) from error
    return list(description.devices)
