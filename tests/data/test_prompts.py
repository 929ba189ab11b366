"""The cached prompts: written, read, bucketed into batches, refused when damaged."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from piflow_jax.config import parse
from piflow_jax.data import batches
from piflow_jax.data.pipeline import BucketSchedule, Order
from piflow_jax.data.prompts import (
    PROMPTS,
    PromptsError,
    PromptsPlan,
    load_prompts_source,
)
from piflow_jax.systems.datasets import shape_of
from tests.modules import load_module

CONFIGS = Path(__file__).parents[2] / "configs"
PLAN = PromptsPlan(
    encoder="abc",
    compute="bfloat16",
    source="nine prompts",
    num_examples=10,
    shard_size=4,
    buckets=((4, 4), (2, 8), (6, 2)),
    bucket_sizes=(5, 1, 3),
    text_features=3,
    pooled_features=2,
    max_length=7,
    latent_channels=1,
    latents="def",
)
SHARDS = [f"prompts.array_record-0000{i}-of-00003" for i in range(3)]
SIZES = [(4, 4)] * 5 + [(2, 8)] + [(6, 2)] * 3
LISTED = [0, 2, 3, 5, 8, 7, 1, 4, 6]


def example(position):
    rng = np.random.default_rng(position)
    empty = position == 9
    made = {
        "prompt": "" if empty else f"Füchse, {position}",
        "index": 9 if empty else LISTED[position],
        "text": rng.normal(size=(1 + position % 6, 3)).astype(np.float32),
        "pooled": rng.normal(size=2).astype(np.float32),
    }
    if not empty:
        made["latents"] = rng.normal(size=(*SIZES[position], 1)).astype(np.float32)
    return made


def write(directory, plan=PLAN, made=example):
    PROMPTS.start(directory, plan)
    for shard in PROMPTS.missing(directory, plan):
        PROMPTS.write(directory, plan, shard, map(made, plan.shard_range(shard)))
    return PROMPTS.finalize(directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prompts")
    write(directory)
    return load_prompts_source(directory, expect_encoder="abc")


def test_what_is_written_is_read(source):
    assert len(source) == 9 and source.text_length == 6  # of at most 7
    assert (source.text_features, source.pooled_features, source.latent_channels) == (3, 2, 1)
    assert source.buckets == PLAN.buckets and source.bucket_sizes == (5, 1, 3)
    for position in range(9):
        expected, found = example(position), source[position]
        assert set(found) == {"x", "condition", "index"}
        condition = found["condition"]
        assert set(condition) == {"text", "text_length", "pooled"}
        length = len(expected["text"])
        assert condition["text_length"] == length and condition["text_length"].dtype == np.int32
        assert condition["text"].shape == (6, 3) and condition["text"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            condition["text"][:length], expected["text"].astype(ml_dtypes.bfloat16)
        )
        assert not condition["text"][length:].any()
        np.testing.assert_array_equal(
            condition["pooled"], expected["pooled"].astype(ml_dtypes.bfloat16)
        )
        assert found["index"] == LISTED[position] and found["index"].dtype == np.int32
        np.testing.assert_array_equal(found["x"], expected["latents"].astype(np.float16))
        assert source.prompts[position] == expected["prompt"]
    assert source.prompts[-1] == "Füchse, 8" and source.prompts[7:] == ["Füchse, 7", "Füchse, 8"]
    with pytest.raises(IndexError, match="no number 9"):
        source[9]


def test_the_empty_prompt_is_apart(source):
    assert set(source.null) == {"text", "text_length", "pooled"}
    assert source.null["text_length"] == 4
    np.testing.assert_array_equal(
        source.null["text"][:4], example(9)["text"].astype(ml_dtypes.bfloat16)
    )


def test_a_set_without_images_or_pooled_embeddings(tmp_path):
    plan = dataclasses.replace(PLAN, pooled_features=0, latent_channels=0, latents="")

    def made(position):
        return {k: v for k, v in example(position).items() if k not in ("pooled", "latents")}

    write(tmp_path, plan, made)
    found = load_prompts_source(tmp_path)
    assert set(found[0]["condition"]) == {"text", "text_length"}
    for network, channels in (("flux", 16), ("qwen_image", 16), ("flux2", 32)):
        config = load_module(CONFIGS / f"{network}.py").get_config("datafree")
        assert shape_of(parse(config), found).channels == channels
    assert found[0]["x"].shape == (*SIZES[0], 0)
    assert set(found.null) == {"text", "text_length"}


def test_the_manifest_tells_what_the_set_is(tmp_path):
    manifest = write(tmp_path)
    shards = manifest.pop("shards")
    plan = json.loads(json.dumps(dataclasses.asdict(PLAN)))
    assert manifest == {"format": 1, **plan}
    assert [shard["file"] for shard in shards] == SHARDS
    assert [shard["text_length"] for shard in shards] == [4, 6, 4]
    # As many tokens as there are, in two bytes each, and little beside them.
    payload = sum(len(example(i)["text"]) * 3 * 2 for i in range(10))
    assert payload < sum(shard["bytes"] for shard in shards)


def test_records_have_their_own_length(tmp_path):
    def made(position):
        tokens = 200 if position == 9 else 100
        return {**example(position), "text": np.ones((tokens, 300), np.float32)}

    plan = dataclasses.replace(PLAN, text_features=300, max_length=512)
    total = sum(shard["bytes"] for shard in write(tmp_path, plan, made)["shards"])
    payload = (9 * 100 + 200) * 300 * 2
    # ArrayRecord ends each of the three files with an index on a border of 64 KiB.
    assert payload < total < payload + 3 * 2 * 65536 + 10 * 1000


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"text": np.zeros((8, 3))}, r"text of 'Füchse, 1' has shape \(8, 3\)"),
        ({"text": np.zeros((0, 3))}, r"text of 'Füchse, 1' has shape \(0, 3\)"),
        ({"text": np.full((1, 3), np.nan)}, "text of 'Füchse, 1' is not finite"),
        ({"pooled": np.zeros(3)}, r"pooled of 'Füchse, 1' has shape \(3,\), expected \(2,\)"),
        ({"latents": np.zeros((2, 8, 1))}, r"latents .* \(2, 8, 1\), expected \(4, 4, 1\)"),
        ({"latents": np.full((4, 4, 1), 1e5)}, "latents of 'Füchse, 1' is not finite in float16"),
    ],
)
def test_a_shard_with_a_wrong_example_does_not_appear(tmp_path, spoilt, message):
    PROMPTS.start(tmp_path, PLAN)
    examples = [{**example(i), **(spoilt if i == 1 else {})} for i in range(4)]
    with np.errstate(over="ignore"), pytest.raises(PromptsError, match=message):
        PROMPTS.write(tmp_path, PLAN, 0, examples)
    assert PROMPTS.missing(tmp_path, PLAN) == [0, 1, 2]


def test_damage_and_other_encoders_are_refused(tmp_path):
    with pytest.raises(PromptsError, match=r"prompts\.json is missing: there are no prompts"):
        load_prompts_source(tmp_path)
    write(tmp_path)
    with pytest.raises(PromptsError, match="encoder 'abc', but 'xyz'"):
        load_prompts_source(tmp_path, expect_encoder="xyz")
    path = tmp_path / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PromptsError, match=f"{SHARDS[1]} has .* remove it"):
        load_prompts_source(tmp_path, verify=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bucket_sizes": (5, 1, 4)}, "are not 10 examples"),
        ({"bucket_sizes": (5, 0, 4)}, "have sizes"),
        ({"buckets": ((4, 4), (2, 8))}, "have sizes"),
        ({"max_length": 0}, "max_length must be positive"),
    ],
)
def test_a_wrong_plan_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **wrong)


def test_batches_are_of_one_bucket_and_cover_it(source):
    iterator = batches(source, batch_size=2, seed=0)
    seen = {size: [] for size in PLAN.buckets}
    for _ in range(90):
        batch = next(iterator)
        size = batch["x"].shape[1:3]
        text = batch["condition"]["text"]
        assert batch["x"].shape == (2, *size, 1)
        assert text.shape == (2, 6, 3) and text.dtype == ml_dtypes.bfloat16
        seen[size].append(batch["index"])
    # Ninety batches are twenty passes over nine prompts: turns in proportion, to less than one.
    assert [len(seen[size]) for size in PLAN.buckets] == [50, 10, 30]
    for (size, found), members in zip(seen.items(), (LISTED[:5], [7], [1, 4, 6]), strict=True):
        passes = np.concatenate(found).reshape(20, -1)
        assert all(sorted(epoch) == sorted(members) for epoch in passes), size
        assert len(members) == 1 or len({tuple(epoch) for epoch in passes}) > 1


def test_every_process_has_the_same_bucket_and_its_rows(source):
    whole = batches(source, batch_size=4, seed=3)
    halves = [batches(source, batch_size=4, seed=3, rows=rows) for rows in ([0, 1], [2, 3])]
    for _ in range(12):
        expected, parts = next(whole), [next(half) for half in halves]
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *parts)
        jax.tree.map(np.testing.assert_array_equal, expected, joined)


def test_a_resumed_stream_goes_on(source):
    first = batches(source, batch_size=2, seed=5)
    for _ in range(7):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    assert state["buckets"] == [5, 1, 3]
    second = batches(source, batch_size=2, seed=5)
    second.set_state(state)
    for _ in range(5):
        expected, found = next(first), next(second)
        np.testing.assert_array_equal(expected["index"], found["index"])
    with pytest.raises(ValueError, match=r"buckets was \[5, 2, 2\]"):
        second.set_state({**state, "buckets": [5, 2, 2]})


@pytest.mark.parametrize(("sizes", "batch"), [((7, 100, 1), 8), ((3, 2), 16), ((64, 32), 32)])
def test_turns_are_in_proportion_and_in_order(sizes, batch):
    schedule = BucketSchedule(sizes, batch, seed=1)
    turns = [0] * len(sizes)
    for i in range(300):
        bucket, before = schedule(i)
        assert before == turns[bucket]
        turns[bucket] += 1
    for size, found in zip(sizes, turns, strict=True):
        # A round, the longest stretch without a promise, is one pass over the data.
        assert abs(found - 300 * size / sum(sizes)) <= size / batch + len(sizes)
    assert BucketSchedule(sizes, batch, seed=1)(250) == schedule(250)


def test_turns_are_shuffled_by_the_seed():
    def sequence(seed):
        schedule = BucketSchedule((64, 64), 4, seed)
        return [schedule(i)[0] for i in range(64)]

    assert sequence(0) == sequence(0) != sequence(1)
    assert sequence(0)[:32] != sequence(0)[32:] and sorted(sequence(0)[:32]) == [0] * 16 + [1] * 16


def test_one_bucket_is_an_order_without_buckets(source):
    schedule = BucketSchedule((9,), 2, seed=0)
    assert [schedule(i) for i in range(5)] == [(0, i) for i in range(5)]
    assert not np.array_equal(Order(20, 0, 1).epoch(0), Order(20, 0, 0).epoch(0))
