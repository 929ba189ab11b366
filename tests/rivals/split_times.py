"""A rival's step timed on two devices that share its parameters; the work directory is given."""

import sys

import jax
from etils import epath

from piflow_jax.config import parse
from piflow_jax.modes.rivals import _Comparison
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shardings import teacher_shardings
from tests.rivals.test_comparison import toy

if __name__ == "__main__":
    settings = toy("regression")
    settings.mesh.fsdp = 2
    config = parse(settings, 2)
    comparison = _Comparison(config, epath.Path(sys.argv[1]), {})
    network = teacher_network(config.model, comparison._data)
    places = teacher_shardings(config, comparison._mesh, network)
    comparison._teacher = jax.jit(network.init, out_shardings=places)(jax.random.key(0))
    step = comparison._timed_call("regression")
    for _ in range(3):
        step()
