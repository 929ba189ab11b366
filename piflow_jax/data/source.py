"""Random access sources: what a pipeline reads from."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from piflow_jax.arguments import check_no_pixels

__all__ = [
    "ArraySource",
    "Source",
    "as_source",
    "check_source",
    "has_states",
    "labelled_pictures",
    "mapped",
    "pixel_source",
    "source_digest",
    "stacked",
]

_DIGESTED = 256  # examples by which a source is known
_MOST_CLASSES = 2**31 - 1  # the null label is an int32 too
_DATA = (
    ": pass arrays x[N, *sites, C], a tuple (x, condition) of arrays, or a piflow_jax.data.Source, "
    "which has a name, a shape and examples by index"
)


class Source(Protocol):
    """A finite data set with random access.

    An example is a mapping with `x`, what networks see, and `condition`: a label `int32[]`, an
    array, a mapping of arrays, or absent where samples have no condition. Keys and shapes are the
    same in all examples; or they are the same within buckets that follow each other, and
    `bucket_sizes` has their numbers of examples.

    Beyond `name` and `shape` these attributes are optional: `num_classes`, so that label
    `num_classes` stands for no condition; `draw(key, x) -> states[B, *sites, C]`, where `x` is not
    the states themselves but what they are drawn from in a training step; `__getitems__(indices)`,
    a list of several examples, read at once; `gather(indices)`, a stacked batch at once, which
    marks a source held in memory; `test`, another source of the same shape, which figures compare
    samples with in place of this one; `class_names`, for captions; `stage()`, called when all
    examples are going to be read, so that one elsewhere can be brought here in the background.

    Attributes:
      name: short name for logs and reports.
      shape: `(*sites, C)` of a state.
    """

    name: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns one example, `0 <= index < len(self)`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ArraySource:
    """Samples held in memory, with or without a condition.

    Attributes:
      name: short name for logs and reports.
      x: float32[N, *sites, C].
      condition: int32[N] labels in [0, num_classes), or arrays `[N, ...]` in a mapping; None for
        none.
      num_classes: number of classes; 0 where the condition is no label.
      class_names: their names, in order; None where they have none.
      test: data that nothing is trained on, for figures; None where there is none.

    Raises:
      ValueError: the arrays do not have these shapes, types or ranges, are empty or not finite.
    """

    name: str
    x: np.ndarray
    condition: Any = None
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None
    test: "ArraySource | None" = None

    def __post_init__(self):  # noqa: D105
        x, condition = self.x, self.condition
        if x.ndim < 2 or x.dtype != np.float32 or len(x) == 0:
            raise ValueError(
                f"{self.name}: `x` must be non-empty float32[N, *sites, C], "
                f"got {x.dtype}{list(x.shape)}"
            )
        check_finite(f"{self.name}: `x`", x)
        x.setflags(write=False)
        if self.num_classes:
            if condition.shape != x.shape[:1] or condition.dtype != np.int32:
                raise ValueError(
                    f"{self.name}: labels must be int32[{len(x)}], "
                    f"got {condition.dtype}{list(condition.shape)}"
                )
            if condition.min() < 0 or condition.max() >= self.num_classes:
                raise ValueError(
                    f"{self.name}: labels must lie in [0, {self.num_classes}), "
                    f"got [{condition.min()}, {condition.max()}]"
                )
        for name, array in _leaves(condition):
            if len(array) != len(x):
                raise ValueError(
                    f"{self.name}: condition{name} has {len(array)} rows, not {len(x)}"
                )
            check_finite(f"{self.name}: condition{name}", array)
            array.setflags(write=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `(*sites, C)` of one sample."""
        return self.x.shape[1:]

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one example: `x: float32[*sites, C]` and its condition."""
        return self.gather(index)

    def gather(self, indices: Any) -> dict[str, Any]:
        """Returns several examples, stacked, as fresh arrays.

        Args:
          indices: int[B] in [0, len(self)).

        Returns:
          `x: float32[B, *sites, C]`, and `condition` with rows alike.
        """
        batch = {"x": self.x[indices]}
        if self.condition is not None:
            batch["condition"] = mapped(lambda a: a[indices], self.condition)
        return batch


def has_states(source: Source) -> bool:
    """Whether examples have states, and not the shape of one alone.

    Args:
      source: the data.

    Returns:
      True if the first example has.
    """
    x = source[0]["x"]
    leaves = x.values() if isinstance(x, Mapping) else [x]
    return bool(np.size(next(iter(leaves))))


def source_digest(source: Source) -> str:
    """Identity of a source, by which a run notices that it goes on with another one.

    Args:
      source: any source.

    Returns:
      SHA-256, 64 hexadecimal digits, of its length and of at most 256 examples spread over it.
    """
    digest = hashlib.sha256(f"{len(source)}{list(source.shape)}".encode())
    for index in _spread(source):
        for path, leaf in sorted(_leaves(source[index])):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{path}{array.dtype}{list(array.shape)}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def check_source(source: Source) -> None:
    """Refuses a caller's source that is not what `Source` says.

    Args:
      source: any source. At most 256 examples spread over it are read.

    Raises:
      ValueError: the source is empty, or an example is no mapping with `x`, has another shape, a
        NaN, an infinity, pixels, or a label outside [0, num_classes).
    """
    name = source.name
    if not len(source):
        raise ValueError(f"{name} is empty: it has no examples")
    classes, one_shape = getattr(source, "num_classes", 0), not hasattr(source, "bucket_sizes")
    states = one_shape and getattr(source, "draw", None) is None
    for index in _spread(source):
        example, what = source[index], f"{name}: example {index}"
        if not isinstance(example, Mapping) or "x" not in example:
            raise ValueError(
                f"{what} must be a mapping with `x`, and with `condition` where there is one, "
                f"got {_named(example)}"
            )
        x, condition = example["x"], example.get("condition")
        # Without states, `x` has only the sites.
        if states and np.size(x):
            array = np.asarray(x)
            check_no_pixels(f"{what}: `x`", array)
            if array.shape != tuple(source.shape):
                wanted = list(source.shape)
                raise ValueError(f"{what}: `x` is {list(array.shape)}, the source says {wanted}")
            check_finite(f"{what}: `x`", array)
        if classes and condition is None:
            raise ValueError(
                f"{what} has no `condition`, and the source has num_classes = {classes}"
            )
        if classes and not isinstance(condition, Mapping):
            label = np.asarray(condition)
            whole = np.issubdtype(label.dtype, np.integer) and not label.ndim
            if not whole or not 0 <= label < classes:
                raise ValueError(
                    f"{what}: its label must be an integer in [0, {classes}), got {label}"
                )
        for path, leaf in _leaves(condition):
            check_finite(f"{what}: condition{path}", np.asarray(leaf))


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuses NaN and infinity.

    Args:
      name: what the array is.
      array: of any type; types without NaN pass.

    Raises:
      ValueError: a number is not finite.
    """
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ValueError(f"{name} has NaN or infinity")


def labelled_pictures(
    name: str, pictures: np.ndarray, labels: np.ndarray, num_classes: int
) -> ArraySource:
    """A labelled set of pictures held in memory.

    Args:
      name: short name for logs and reports.
      pictures: float32[N, H, W, C] in [-1, 1].
      labels: int32[N] in [0, num_classes).
      num_classes: number of classes.

    Returns:
      The source.

    Raises:
      ValueError: the arrays do not have these shapes, types or ranges, or are empty.
    """
    source = ArraySource(name=name, x=pictures, condition=labels, num_classes=num_classes)
    low, high = float(pictures.min()), float(pictures.max())
    if pictures.ndim != 4 or not (low >= -1.0 and high <= 1.0):
        raise ValueError(
            f"{name}: pictures must be [N, H, W, C] in [-1, 1], got {list(pictures.shape)} in "
            f"[{low}, {high}]"
        )
    return source


def pixel_source(
    name: str, pixels: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]
) -> ArraySource:
    """A labelled set of pictures from their pixels, held in memory.

    Args:
      name: short name for logs and reports.
      pixels: numbers `[N, H, W]` or `[N, H, W, C]` in [0, 255], of any type.
      labels: integers `[N]`, places in `class_names`.
      class_names: names of the classes.

    Returns:
      The source; its pictures are scaled to [-1, 1].

    Raises:
      ValueError: see `labelled_pictures`.
    """
    scaled = pixels.astype(np.float32).reshape(*pixels.shape[:3], -1)
    scaled /= np.float32(127.5)
    scaled -= np.float32(1.0)
    source = labelled_pictures(name, scaled, labels.astype(np.int32), len(class_names))
    return dataclasses.replace(source, class_names=class_names)


def as_source(data: Any, name: str = "arrays") -> Source:
    """A source of what a caller has.

    Args:
      data: a source; an array `x[N, *sites, C]`; or a pair of it and labels `int[N]` or a mapping
        of arrays `[N, ...]`.
      name: name of a source that is made of arrays.

    Returns:
      The source itself, or an `ArraySource` whose number of classes is one more than the largest
      label.

    Raises:
      ValueError: arrays that are no such thing.
    """
    if hasattr(data, "__getitem__") and hasattr(data, "shape") and hasattr(data, "name"):
        return data
    pair = isinstance(data, tuple) and len(data) == 2
    x, condition = data if pair else (data, None)
    x = _numbers(f"{name}: x", x, _DATA)
    check_no_pixels(f"{name}: x", x)
    x = np.array(x, np.float32)
    if condition is None:
        return ArraySource(name=name, x=x)
    if isinstance(condition, Mapping):
        what = f"{name}: condition."
        arrays = {key: np.array(_numbers(what + key, a)) for key, a in condition.items()}
        return ArraySource(name=name, x=x, condition=arrays)
    labels = np.asarray(condition)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name}: labels must be integers [N], got {labels.dtype}{list(labels.shape)}"
        )
    classes = int(labels.max(initial=0)) + 1
    if classes > _MOST_CLASSES:
        raise ValueError(f"{name}: labels must be below {_MOST_CLASSES:,}, got {classes - 1}")
    return ArraySource(name=name, x=x, condition=labels.astype(np.int32), num_classes=classes)


def stacked(examples: list[Any]) -> Any:
    """Stacks examples on a leading axis.

    Args:
      examples: arrays of equal shapes, or mappings and tuples of them, of any depth.

    Returns:
      The structure of one example, its arrays `[len(examples), ...]`.
    """
    first = examples[0]
    if isinstance(first, Mapping):
        return {key: stacked([example[key] for example in examples]) for key in first}
    if isinstance(first, tuple):
        return tuple(stacked(list(parts)) for parts in zip(*examples, strict=True))
    return np.stack(examples)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to the leaves of nested mappings and tuples.

    Args:
      function: What becomes of a leaf.
      tree: A leaf, or a mapping or tuple of them, of any depth.

    Returns:
      The same structure.
    """
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(mapped(function, value) for value in tree)
    return function(tree)


def _leaves(tree: Any, path: str = "") -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, tuple):
        tree = dict(enumerate(tree))
    if isinstance(tree, Mapping):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}")]
    return [] if tree is None else [(path, tree)]


def _numbers(what: str, values: Any, remedy: str = "") -> np.ndarray:
    """A caller's rows of numbers as an array."""
    refused = f"{what} must be an array of numbers with N rows, got {_named(values)}{remedy}"
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(refused) from error
    # Objects are what NumPy makes of data sets and iterators that it does not know.
    if not array.ndim or array.dtype.kind in "cmMOSU":
        raise ValueError(refused)
    return array


def _named(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _spread(source: Source) -> list[int]:
    """Places of the examples by which a source is known."""
    return np.unique(np.linspace(0, len(source) - 1, _DIGESTED).astype(int)).tolist()
