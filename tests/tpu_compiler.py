"""The environment of a process that compiles for TPUs which are not there."""

import os


def environment() -> dict[str, str]:
    """This process's, with what libtpu needs and without what it does not know."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",  # it ends at the CPU compiler's flags of conftest
    }
