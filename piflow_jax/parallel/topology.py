"""What accelerators can do, and TPU slices that are not here, to compile for ahead of time."""

import dataclasses
import importlib.util
import os
import re

__all__ = ["CHIPS", "Chip", "peak_flops", "topology_devices"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most, as its maker says.

    Attributes:
      memory: bytes of high-bandwidth memory.
      flops: bfloat16 operations per second.
      links: bytes per second that a chip sends to its neighbours, over all links together.
      network: bytes per second of a chip's share of its host's network, between slices.
    """

    memory: int
    flops: float
    links: float
    network: float


# By the part of a topology's name before the colon. A v5p and a v6e device is one chip.
CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12, 1600e9 / 8, 25e9 / 8),
    "v5p": Chip(95 * 2**30, 459e12, 4800e9 / 8, 50e9 / 8),
    "v6e": Chip(32 * 2**30, 918e12, 3200e9 / 8, 100e9 / 8),
}


# The makers' bfloat16 rates of dense products, by what JAX's `device_kind` starts with. A longer
# name comes before what it starts with. A v2 or v3 device is half a chip.
_PEAKS = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
}


def peak_flops(device) -> float | None:
    """The bfloat16 operations per second that a device can do at most, as its maker says.

    Args:
      device: one of JAX's devices.

    Returns:
      The rate; None for a device that is not in the table, such as a CPU.
    """
    for start, rate in _PEAKS.items():
        if device.device_kind.startswith(start):
            return rate
    return None


def topology_devices(topology: str) -> list:
    """The devices of a slice that need not be attached.

    Args:
      topology: such as `v5e:4x4`, `v5p:2x2x1` or `v6e:2x4`; `v5e:16x16*4` is four such slices.

    Returns:
      The devices, for `device_mesh`; programs can be lowered and compiled for them, not run.

    Raises:
      ValueError: the name is not one that `libtpu` knows, or `libtpu` is not installed.
    """
    from jax.experimental import topologies  # loads libtpu

    size = "[1-9][0-9]*"
    if not re.fullmatch(rf"({'|'.join(CHIPS)}):{size}(x{size}){{1,2}}(\*{size})?", topology):
        raise ValueError(
            f"unknown topology {topology!r}; it is a chip ({', '.join(CHIPS)}), a colon and the "
            "slice's shape, such as v5e:4x4, and *N for N slices"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # not on a TPU VM: there is no metadata
    try:
        name, _, slices = topology.partition("*")
        several = {"num_slices": int(slices)} if slices else {}
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
    except Exception as error:  # jax raises its own runtime errors here, of no common class
        remedy = "name the shape of a slice that there is, such as v5e:4x4"
        if importlib.util.find_spec("libtpu") is None:
            remedy = 'compiling for TPUs needs libtpu: pip install -e ".[tpu]"'
        raise ValueError(f"cannot make the topology {topology!r} ({error}); {remedy}") from error
    return list(description.devices)
