"""A network's variables from a checkpoint or a weight file, on the devices that shardings name."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from piflow_jax.loading.routes import route
from piflow_jax.parallel import moved
from piflow_jax.systems.network import Network, abstract_variables
from piflow_jax.systems.networks import without_scales
from piflow_jax.systems.spec import updated_settings


def averaged(
    directory: str | os.PathLike, network: Network, step: int | None = None, shardings: Any = None
) -> Any:
    """The averaged variables of a checkpoint.

    Args:
      directory: the directory of checkpoints, or the folder of one step.
      network: the network that has these variables.
      step: the step, by default the latest.
      shardings: a tree of shardings, or one for all variables; None is the default device.

    Returns:
      The variables; for a network with adapters, its trained part.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it belongs to another network.
    """
    # Orbax takes a second to load, which a notebook without checkpoints need not wait for.
    from piflow_jax.runs.checkpoint import read_spec, restore_subtree

    rounded, exact = network.exact != network and not network.adapted, network
    if rounded:
        exact = network.exact_in(saved_base_dtype(read_spec(directory, step)[2]) or "float32")
    like, carried = _like(exact, shardings), ()
    if network.adapted:
        return restore_subtree(directory, "ema_params", like, step)
    trained = restore_subtree(directory, "ema_params", network.trained(like), step)
    if network.carries:
        carried = restore_subtree(directory, "carried", network.carried(like), step)
    variables = network.with_base(trained, carried)
    if not rounded:
        return variables
    keep = _keeper(network, shardings)
    return unflatten_dict({path: keep(path, a) for path, a in flatten_dict(variables).items()})


def saved_base_dtype(settings: Mapping[str, Any]) -> str | None:
    """The dtype of the base in a run's settings, where they have one."""
    found = updated_settings(settings)
    return found.get(f"model.{found.get('model.network')}.base_dtype")


def find_checkpoint(
    path: epath.Path, stage: str
) -> tuple[epath.Path, int, dict[str, Any], dict[str, Any]]:
    """The latest checkpoint of a run's stage, or of a directory.

    Args:
      path: the run's work directory, a directory of checkpoints, or one of their steps.
      stage: `teacher` or `student`.

    Returns:
      `(directory, step, spec, settings)`.

    Raises:
      CheckpointError: there is none, or it is unusable.
    """
    # Orbax takes a second to load, which a notebook without checkpoints need not wait for.
    from piflow_jax.runs.checkpoint import read_spec

    # A run's directory is one before this stage has begun, too; read_spec says what it lacks.
    run = any((path / folder).is_dir() for folder in ("teacher", "student"))
    places = (path / stage / "checkpoints", path / "checkpoints", path)
    directory = places[0] if run else next((place for place in places if place.is_dir()), path)
    return directory, *read_spec(directory)


def converted(
    weights: Mapping[str, Any], network: Network, form: str, shardings: Any = None
) -> Any:
    """The variables of a weight file under official names.

    Args:
      weights: the result of `open_weights`.
      network: the network that has these variables.
      form: the layout, a name of `piflow_jax.convert.load_params`; ignored for adapters.
      shardings: see `averaged`.

    Returns:
      The variables, in the network's dtypes; for a network with adapters, its trained part.

    Raises:
      ImportError: PyTorch reads this file and is not installed.
      ValueError: the weights belong to another network, or are damaged.
    """
    from piflow_jax.convert import load_adapter, load_params
    from piflow_jax.convert.rules import LazyPlace

    like = flatten_dict(_like(network.exact, shardings)["params"])
    keep = _keeper(network, shardings)

    def place(name: tuple[str, ...], leaf: Any) -> Any:
        # One that has no place is no parameter of the network, which is said where it is read.
        if name not in like:
            return jnp.asarray(np.asarray(leaf))
        return keep(("params", *name), _put(leaf, like[name]))

    if network.adapted:
        return load_adapter(network.module, weights, place=LazyPlace(place))
    return load_params(network.module, weights, form, LazyPlace(place))


def _keeper(network: Network, shardings: Any) -> Callable[[tuple[str, ...], jax.Array], Any]:
    """`Network.kept` with the shardings of each path."""
    several = isinstance(shardings, Mapping)
    places = flatten_dict(shardings) if several else {}
    return lambda path, leaf: network.kept(path, leaf, places[path] if several else shardings)


def _like(network: Network, shardings: Any) -> Any:
    """Shapes of variables, of adapted ones those that are trained, with their shardings."""
    abstract = abstract_variables(network)
    if network.adapted:
        abstract = network.trained(abstract)
    if shardings is None:
        return abstract
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    places = without_scales(shardings)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), abstract, places)


def _put(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf on its devices; of several processes each reads a part."""
    if like.sharding is None:
        return jnp.asarray(np.asarray(leaf), like.dtype)
    devices = like.sharding.addressable_devices
    shardings, axis, runs = route(leaf.shape, leaf.rows, like.sharding, devices)
    before = (slice(None),) * axis
    parts = [np.asarray(leaf[(*before, slice(run.start, run.stop))], like.dtype) for run in runs]

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[axis].indices(leaf.shape[axis])
        run, part = next(pair for pair in zip(runs, parts, strict=True) if start in pair[0])
        return part[(*index[:axis], slice(start - run.start, stop - run.start), *index[axis + 1 :])]

    array = jax.make_array_from_callback(leaf.shape, shardings[0], of_device)
    for sharding in shardings[1:]:
        array = moved(array, sharding)
    return array
