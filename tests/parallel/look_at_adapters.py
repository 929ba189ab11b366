"""Looks at a student with adapters, its teacher split over all processes; prints the figures."""

import json
import sys

import jax

from piflow_jax.config import ProcessesConfig, parse
from piflow_jax.distillation.stages import student_stage
from piflow_jax.modes.look import student_look
from piflow_jax.parallel import device_mesh, processes, replicated
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import load_source
from piflow_jax.systems.judges import config_judge
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.shardings import teacher_shardings
from tests import tiny_text

if __name__ == "__main__":
    processes.start(ProcessesConfig(start_seconds=60))
    settings = tiny_text.get_config()
    settings.model.flux.lora_rank = 4
    settings.evaluation.every, settings.evaluation.every_samples = 1, 20
    config = parse(settings, None)
    mesh = device_mesh(fsdp=jax.device_count())
    source = load_source(config.data)
    data = DataShape.of(config.data.name, source)

    network = teacher_network(config.model, data)
    where = teacher_shardings(config, mesh, network)
    teacher = jax.jit(network.init, out_shardings=where)(jax.random.key(0))
    look = student_look(config, source, data, config_judge(config, source, "."))
    systems = Systems.of(config, data, source.null)
    stage = student_stage(systems, source, teacher, mesh, look=look)
    params = jax.jit(
        lambda teacher: stage.init(teacher).ema_params, out_shardings=replicated(mesh)
    )(teacher)
    look = stage.look(jax.tree.map(lambda leaf: leaf.addressable_data(0), params), ())
    print(json.dumps(look.figures))
    sys.exit(processes.end(0))
