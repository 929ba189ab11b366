"""Limits of accelerators, absent TPU slices to compile for, and a setting of their compiler."""

import dataclasses
import importlib.util
import math
import os
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """Upper limits of a chip, from its maker.

    Attributes:
      memory: bytes of high-bandwidth memory.
      flops: bfloat16 operations per second.
      links: bytes per second that a chip sends to its neighbours, summed over all links.
      network: bytes per second of a chip's share of its host's network, between slices.
    """

    memory: int
    flops: float
    links: float
    network: float


_HOST_CHIPS = 4
# By the part of a topology's name before the colon. A device of v5p and v6e is one chip.
CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12, 1600e9 / 8, 25e9 / 8),
    "v5p": Chip(95 * 2**30, 459e12, 4800e9 / 8, 50e9 / 8),
    "v6e": Chip(32 * 2**30, 918e12, 3200e9 / 8, 100e9 / 8),
}


# The makers' bfloat16 rates of dense products, by the beginning of JAX's `device_kind`. A longer
# name comes before its own beginning. A v2 or v3 device is half a chip.
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
    """The maker's limit on bfloat16 operations per second of a device.

    Args:
      device: one of JAX's devices.

    Returns:
      The rate; None for a device without an entry in the table, such as a CPU.
    """
    for start, rate in _PEAKS.items():
        if device.device_kind.startswith(start):
            return rate
    return None


_LIBTPU_FLAGS = "LIBTPU_INIT_ARGS"
_LEAST_CUT = "--xla_jf_spmd_threshold_for_windowed_einsum_mib"


def gather_weights_whole() -> None:
    """Tells the compiler for TPUs to fetch all of a layer's weights before its products.

    By default it cuts products into pieces, as wide as the part of the weights that a device holds.
    By its own estimate, the ImageNet step takes three times as long then (`docs/imagenet.md`).

    The setting is a flag in `LIBTPU_INIT_ARGS`, which libtpu reads when it is loaded. A value that
    is in this variable already stays.
    """
    flags = os.environ.get(_LIBTPU_FLAGS, "")
    if _LEAST_CUT not in flags:
        os.environ[_LIBTPU_FLAGS] = f"{flags} {_LEAST_CUT}=1000000".lstrip()


def topology_devices(topology: str) -> list:
    """The devices of a slice that need not be attached.

    Args:
      topology: such as `v5e:4x4`, `v5p:2x2x1` or `v6e:2x4`; `v5e:16x16*4` is four such slices.

    Returns:
      The devices, for `device_mesh`. Programs can be lowered and compiled for them, but not run.

    Raises:
      ValueError: `libtpu` does not know the name, or is not installed.
    """
    from jax.experimental import topologies  # loads libtpu

    size = "[1-9][0-9]*"
    if not re.fullmatch(rf"({'|'.join(CHIPS)}):{size}(x{size}){{1,2}}(\*{size})?", topology):
        raise ValueError(
            f"unknown topology {topology!r}; it is a chip ({', '.join(CHIPS)}), a colon and the "
            "slice's shape, such as v5e:4x4, and *N for N slices"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # outside a TPU VM there is no metadata
    try:
        name, _, slices = topology.partition("*")
        options = {"num_slices": int(slices)} if slices else {}
        shape = tuple(map(int, name.partition(":")[2].split("x")))
        if math.prod(shape) < _HOST_CHIPS:  # by default a slice has whole hosts
            options["chips_per_host_bounds"] = (*shape, 1)[:3]
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # jax raises various runtime errors here, without a common class
        remedy = "name the shape of a slice that there is, such as v5e:4x4"
        if importlib.util.find_spec("libtpu") is None:
            remedy = 'compiling for TPUs needs libtpu: pip install -e ".[tpu]"'
        raise ValueError(f"cannot make the topology {topology!r} ({error}); {remedy}") from error
    return list(description.devices)
