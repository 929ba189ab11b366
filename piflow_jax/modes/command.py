"""Runs a mode, from settings to exit status: the part that all modes share."""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from absl import logging

from piflow_jax.buckets import is_remote
from piflow_jax.config import Config, ConfigError, check_devices, naming, parse
from piflow_jax.data.pictures import PicturesError
from piflow_jax.data.shards import ShardsError
from piflow_jax.evaluation.kept import KeptFileError
from piflow_jax.loading.hub_weights import with_commits
from piflow_jax.modes.adm import write_reference
from piflow_jax.modes.compile import compile_sampling, compile_step
from piflow_jax.modes.evaluate import evaluate
from piflow_jax.modes.evaluate_prompts import evaluate_images
from piflow_jax.modes.export import export
from piflow_jax.modes.features import make_features
from piflow_jax.modes.prepare import prepare_latents
from piflow_jax.modes.prepare_images import in_workdir, prepare_missing, prepare_pixels
from piflow_jax.modes.prepare_prompts import prepare_prompts
from piflow_jax.modes.rivals import compare_rivals
from piflow_jax.modes.sample import sample
from piflow_jax.modes.train import train
from piflow_jax.parallel import processes, slice_count
from piflow_jax.parallel.topology import gather_weights_whole
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.runs.loop import Interrupted, NonFiniteLossError
from piflow_jax.runs.workdir import check_writable, user_path
from piflow_jax.systems.datasets import DATASETS, dataset
from piflow_jax.systems.sampling import sampling_cautions, sampling_guidance
from piflow_jax.systems.settings import check_choices


def _prepare(config: Config, workdir: str | os.PathLike) -> None:
    row = dataset(config)
    of_classes = prepare_pixels if row.pictures else prepare_latents
    of_data = of_classes if row.by_class else prepare_prompts
    place = config.data.data_dir
    if is_remote(place):
        check_writable(place, instead="name another config.data.data_dir")
    of_data(config, workdir)


def _evaluate(config: Config, workdir: str | os.PathLike) -> None:
    of_data = evaluate if dataset(config).by_class else evaluate_images
    of_data(config, workdir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """A row of `MODES`.

    Attributes:
      run: the function `(config, workdir)` of the mode.
      batches: groups of settings whose batch size the mode uses.
      batches_of_prompts: the same for data without classes. On these no teacher is trained, and
        nothing is sampled while a student is trained. None means the same as `batches`.
      here: it computes on this machine's devices, not for a slice that need not be attached.
      in_workdir: it writes to the run's directory, not to a place that the settings name.
      begins: it makes that directory before it has anything to write.
      wants: keys, at least one of which the data must use; empty for any data.
      needs_data: pictures that are not prepared yet are prepared first.
    """

    run: Callable[[Config, str | os.PathLike], Any]
    batches: tuple[str, ...] = ("train", "teacher", "evaluation")
    batches_of_prompts: tuple[str, ...] | None = None
    here: bool = True
    in_workdir: bool = True
    begins: bool = True
    wants: frozenset[str] = frozenset()
    needs_data: bool = False


MODES: dict[str, Mode] = {
    "train": Mode(run=train, batches_of_prompts=("train",), needs_data=True),
    "evaluate": Mode(run=_evaluate, batches=("evaluation",), batches_of_prompts=(), begins=False),
    "sample": Mode(run=sample, batches=("evaluation",), begins=False),
    "export": Mode(run=export, batches=(), begins=False),
    "prepare": Mode(
        run=_prepare,
        batches=(),
        in_workdir=False,
        wants=frozenset({"data.images", "data.prompts"}),
    ),
    "statistics": Mode(
        run=write_reference,
        batches=(),
        in_workdir=False,
        wants=frozenset({"evaluation.reference"}),
    ),
    "features": Mode(run=make_features, batches=(), needs_data=True),
    "compile": Mode(run=compile_step, here=False),
    "compile_sampling": Mode(run=compile_sampling, here=False),
    "rivals": Mode(run=compare_rivals, needs_data=True),
}
# What a user can mend, or start again after; the rest are ours, and have a traceback.
_OF_THE_RUN = (
    *(CheckpointError, KeptFileError, NonFiniteLossError, OSError),
    processes.ProcessError,
)
_STOPPED = "stopped by Ctrl-C; the same command continues from what was saved"
# What neither the settings' sizes nor the compiler foresaw.
_NO_MEMORY = (
    "not enough memory ({error}); lower the batch sizes of config.train, config.teacher or "
    "config.evaluation, raise config.train.microbatches, or set config.model.remat"
)


def run(mode: str, config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> int:
    """Runs a mode; errors that a user can mend are one paragraph, not a traceback.

    Starts the processes of a cluster first. After an error that only some of them have, it does not
    return, see `processes.end`.

    Args:
      mode: a key of `MODES`.
      config: what a config file made and flags changed.
      workdir: the run's directory; made if need be.

    Returns:
      The exit status: 0; 2 for settings or data; 1 for the run; 130 after SIGINT.
    """
    try:
        workdir = user_path(workdir, "--workdir")
        parsed = parse(config, None)
        check_choices(parsed)
        _check_data(parsed, mode)
        pictures = dataset(parsed).pictures
        if pictures:
            parsed = in_workdir(parsed, workdir)
        _start(parsed, MODES[mode], workdir)
        parsed = with_commits(parsed, fetch=parsed.download and MODES[mode].here)
        _caution(parsed, MODES[mode])
        if pictures and MODES[mode].needs_data:
            prepare_missing(parsed, workdir)
        MODES[mode].run(parsed, workdir)
    except KeyboardInterrupt:
        return _refuse(_STOPPED, 130)
    except Interrupted as stop:
        logging.info("%s", stop)
        return processes.end(0 if stop.signal == "SIGTERM" else 130, agreed=True)
    except (ConfigError, FileNotFoundError, PicturesError, ShardsError) as error:
        return _refuse(str(error), 2)
    except Exception as error:
        lost = processes.lost(error)
        if lost or isinstance(error, _OF_THE_RUN):
            return _refuse(lost or str(error), 1)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return _refuse(_NO_MEMORY.format(error=str(error).partition("\n")[0]), 1)
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        return _refuse(f"process {jax.process_index()} of {jax.process_count()} failed", 1)
    return processes.end(0)


def _check_data(config: Config, mode: str) -> None:
    wanted = MODES[mode].wants
    if wanted and not wanted & dataset(config).uses:
        names = [repr(name) for name, row in DATASETS.items() if wanted & row.uses]
        raise ConfigError(
            f"--mode={mode} is for config.data.name = {' or '.join(names)}, got "
            f"{config.data.name!r}"
        )


def _start(config: Config, mode: Mode, workdir: str | os.PathLike) -> None:
    if config.compilation_cache:
        cache = user_path(config.compilation_cache, "config.compilation_cache")
        with naming(f"config.compilation_cache must be a directory, {cache} is none", OSError):
            cache.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", os.fspath(cache))
        # On several devices a fused rollout, and cuDNN's attention, are named in the program by an
        # address in this process: no other process would find it. What they do follows from the
        # rest of the program: the rollout's version is in its name, attention's settings are in the
        # shapes of its arguments.
        setting = "jax_remove_custom_partitioning_ptr_from_cache_key"
        if hasattr(jax.config, setting):  # not every JAX has it
            jax.config.update(setting, True)
    if config.mesh.tensor == 1:  # else products are cut over that axis, as they are meant to be
        gather_weights_whole()
    if mode.here:
        processes.start(config.processes)
        groups = mode.batches
        if not dataset(config).by_class and mode.batches_of_prompts is not None:
            groups = mode.batches_of_prompts
        here = jax.device_count(), jax.process_count(), slice_count()
        check_devices(config, *here, groups=groups)
    if mode.in_workdir:
        check_writable(workdir)
    if mode.in_workdir and mode.begins:
        user_path(workdir).mkdir(parents=True, exist_ok=True)


def _caution(config: Config, mode: Mode) -> None:
    """Says what settings of sampling ask of a student that it cannot do."""
    if "evaluation" in mode.batches and not jax.process_index():
        settings = config.evaluation
        options = {
            "temperature": settings.temperature,
            "guidance": sampling_guidance(config),
            "guidance_range": config.teacher.guidance_range,
        }
        for caution in sampling_cautions(config.train, config.sampling_nfe, **options):
            logging.info("note: config.evaluation: %s", caution)


def _refuse(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return processes.end(code)
