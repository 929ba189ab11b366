import json
import threading

import numpy as np
import pytest

from piflow_jax.data import ArraySource, batches
from piflow_jax.data.images import load_images_source, prepare_images
from piflow_jax.data.latents import load_latents_source
from piflow_jax.data.pipeline import Order
from piflow_jax.data.prompts import load_prompts_source
from tests.data import test_images, test_latents, test_prompts

LENGTH = 23


def make_source(length=LENGTH):
    """Images whose pixels carry the example's index, so that a batch says what it holds."""
    index = np.arange(length, dtype=np.float32)
    images = np.broadcast_to(index[:, None, None, None] / 100, (length, 2, 3, 1)).copy()
    labels = np.arange(length, dtype=np.int32) % 5
    return ArraySource(name="toy", x=images, condition=labels, num_classes=5)


class OnDisk:
    """The same examples one at a time, as a file would give them."""

    def __init__(self, source, many=False):
        self.source = source
        self.threads = set()
        if many:
            self.__getitems__ = lambda indices: [source[i] for i in indices]

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.threads.add(threading.current_thread().name)
        return self.source[index]


def indices(batch):
    found = np.rint(batch["x"][:, 0, 0, 0] * 100).astype(int)
    np.testing.assert_array_equal(batch["condition"], found % 5)  # image and label stay together
    return found


def take(iterator, count):
    return [indices(next(iterator)) for _ in range(count)]


def test_batches_have_the_promised_shapes_and_types():
    batch = next(batches(make_source(), batch_size=6, seed=0, rows=range(3, 6)))
    assert set(batch) == {"x", "condition"}
    assert batch["x"].shape == (3, 2, 3, 1) and batch["x"].dtype == np.float32
    assert batch["condition"].shape == (3,) and batch["condition"].dtype == np.int32


@pytest.mark.parametrize("batch_size", [1, 7, 23, 60])
def test_every_epoch_covers_each_example_once_in_a_fresh_order(batch_size):
    iterator = batches(make_source(), batch_size=batch_size, seed=3)
    stream = np.concatenate(take(iterator, -(-4 * LENGTH // batch_size)))
    epochs = stream[: 4 * LENGTH].reshape(4, LENGTH)
    for epoch in epochs:
        assert sorted(epoch) == list(range(LENGTH))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_the_seed_alone():
    first = take(batches(make_source(), batch_size=8, seed=5), 9)
    again = take(batches(make_source(), batch_size=8, seed=5), 9)
    other = take(batches(make_source(), batch_size=8, seed=6), 9)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # A later epoch of one seed is not an earlier epoch of the next seed.
    assert not np.array_equal(Order(LENGTH, 5).epoch(1), Order(LENGTH, 6).epoch(0))


def test_order_is_frozen_for_ever():
    # A checkpoint's position only means something while this holds, on any machine and NumPy.
    assert Order(10, 0).epoch(0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert Order(10, 2**64 - 1).epoch(7).tolist() == [3, 0, 7, 4, 6, 9, 8, 1, 5, 2]


def test_shuffle_is_uniform():
    # Over 3,000 epochs each of 6 examples is first about 500 times (standard deviation 20).
    order = Order(6, 1)
    first = np.array([order.epoch(epoch)[0] for epoch in range(3000)])
    np.testing.assert_allclose(np.bincount(first, minlength=6), 500, atol=100)


@pytest.mark.parametrize("rows", [range(6), range(6, 12), [11], [0, 1, 4, 5, 8, 9]])
def test_processes_read_their_rows_of_the_same_batches(rows):
    alone = take(batches(make_source(), batch_size=12, seed=1), 8)
    mine = take(batches(make_source(), batch_size=12, seed=1, rows=rows), 8)
    np.testing.assert_array_equal(mine, np.stack(alone)[:, list(rows)])


@pytest.mark.parametrize("many", [False, True])
def test_a_source_on_disk_gives_the_same_stream_from_threads(many):
    disk = OnDisk(make_source(), many)
    np.testing.assert_array_equal(
        take(batches(disk, batch_size=9, seed=2), 12),
        take(batches(make_source(), batch_size=9, seed=2), 12),
    )


def test_only_sources_on_disk_are_read_by_threads():
    readers = set()

    class InMemory(OnDisk):
        def gather(self, indices):
            readers.add(threading.current_thread().name)
            return self.source.gather(indices)

    take(batches(InMemory(make_source()), batch_size=9, seed=2), 5)
    assert readers == {threading.current_thread().name}
    disk = OnDisk(make_source())
    take(batches(disk, batch_size=9, seed=2), 5)
    assert threading.current_thread().name not in disk.threads


@pytest.mark.parametrize(
    ("write", "load"),
    [
        (lambda d: prepare_images(d, test_images.PLAN, test_images.Pictures()), load_images_source),
        (test_latents.write, load_latents_source),
        (test_prompts.write, load_prompts_source),
    ],
    ids=["images", "latents", "prompts"],
)
def test_the_records_of_a_batch_are_read_by_one_call(tmp_path, monkeypatch, write, load):
    from array_record.python.array_record_data_source import ArrayRecordDataSource as Library

    write(tmp_path)
    monkeypatch.setattr("piflow_jax.data.images._IN_MEMORY", 0)
    source, sizes = load(tmp_path), []
    read = Library.__getitems__
    monkeypatch.setattr(Library, "__getitems__", lambda *a: sizes.append(len(a[1])) or read(*a))
    monkeypatch.setattr(Library, "__getitem__", lambda *a: sizes.append(1))
    iterator = batches(source, batch_size=3, seed=0)
    for _ in range(2):
        next(iterator)
    assert set(sizes) == {3}


@pytest.mark.parametrize("wrap", [lambda s: s, OnDisk], ids=["memory", "disk"])
@pytest.mark.parametrize("taken", [0, 1, 3, 11])
def test_resumes_exactly_in_the_middle_of_an_epoch(wrap, taken):
    iterator = batches(wrap(make_source()), batch_size=5, seed=4)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 10)
    resumed = batches(wrap(make_source()), batch_size=5, seed=4)
    take(resumed, 2)  # set_state also rewinds
    resumed.set_state(state)
    assert resumed.get_state() == state
    np.testing.assert_array_equal(take(resumed, 10), expected)


def test_state_is_the_same_on_every_process():
    states = []
    for rows in ([0, 1], [2, 3]):
        iterator = batches(make_source(), batch_size=4, seed=0, rows=rows)
        take(iterator, 3)
        states.append(iterator.get_state())
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (LENGTH, {"seed": 1}, "seed was 0 and is now 1"),
        (LENGTH, {"batch_size": 8}, "batch_size was 4 and is now 8"),
        (LENGTH + 1, {}, "length was 23 and is now 24"),
        (LENGTH + 1, {"seed": 9}, "seed was 0 and is now 9; length was 23 and is now 24"),
    ],
)
def test_a_state_of_another_pipeline_is_refused(length, options, message):
    state = batches(make_source(), batch_size=4, seed=0).get_state()
    other = batches(make_source(length), **{"batch_size": 4, "seed": 0, **options})
    with pytest.raises(ValueError, match=message):
        other.set_state(state)


@pytest.mark.parametrize("change", [{"position": -1}, {"position": 1.5}, {"extra": 0}])
def test_a_broken_state_is_refused(change):
    iterator = batches(make_source(), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="position"):
        iterator.set_state({**iterator.get_state(), **change})
    with pytest.raises(ValueError, match="position"):
        iterator.set_state({"position": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4.0}, "batch_size"),
        ({"rows": [3, 4]}, r"rows must be integers in \[0, 4\), at least one, got \[3 4\]"),
        ({"rows": [-1]}, "rows"),
        ({"rows": []}, "rows"),
        ({"rows": [0.5]}, "rows"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches(make_source(), **{"batch_size": 4, "seed": 0, **options})


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="source is empty"):
        batches([], batch_size=1, seed=0)


def test_epoch_counts_passes():
    iterator = batches(make_source(), batch_size=LENGTH // 2, seed=0)
    take(iterator, 3)
    assert iterator.epoch == pytest.approx(33 / 23)
