"""Lists of prompts in three formats; what is wrong in them is named."""

import json

import pytest

from piflow_jax.data.prompt_lists import ASPECTS, Prompt, bucket_size, list_digest, read_prompts


def test_lines_of_text(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a red fox\n\n  ein Füchslein \n")
    assert read_prompts(path) == [Prompt("a red fox"), Prompt("ein Füchslein")]


ENTRIES = [
    {"prompt": "plain"},
    {"prompt": "wide", "aspect": "16:9"},
    {"prompt": "tall", "height": 1024, "width": 512},
    {"prompt": "seen", "image": "images/0.png"},
]


EXPECTED = [
    Prompt("plain"),
    Prompt("wide", 16 / 9),
    Prompt("tall", 0.5),
    Prompt("seen", 1.0, "images/0.png"),
]


def test_json_lines(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, ENTRIES)) + "\n\n")
    assert read_prompts(path) == EXPECTED


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "list.parquet"
    keys = ("prompt", "aspect", "height", "width", "image")
    columns = {key: [entry.get(key) for entry in ENTRIES] for key in keys}
    parquet.write_table(pyarrow.table({**columns, "other": [1, 2, 3, 4]}), path, row_group_size=2)
    assert read_prompts(path) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "must end in one of"),
        ("a.txt", "\n", "has no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', "line 2: "),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "x"}', "line 2 has no text under 'prompt'"),
        ("a.jsonl", '["x"]', "line 1 has no text"),
        ("a.jsonl", '{"prompt": "x", "aspect": "wide"}', "line 1: 'aspect' must be like '16:9'"),
        ("a.jsonl", '{"prompt": "x", "aspect": 1.5}', "must be like '16:9'"),
        ("a.jsonl", '{"prompt": "x", "aspect": "0:1"}', "must be like '16:9'"),
        ("a.jsonl", '{"prompt": "x", "height": 512}', "'height' and 'width' positive"),
        ("a.jsonl", '{"prompt": "x", "image": 3}', "'image' must name a file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such list"):
        read_prompts(tmp_path / "list.txt")


def test_shapes_have_about_the_area_and_the_aspect():
    for width, height in ASPECTS:
        rows, columns = bucket_size(width / height, 1024)
        assert rows % 16 == columns % 16 == 0
        assert abs(rows * columns / 1024**2 - 1) < 0.03
        assert abs(columns / rows * height / width - 1) < 0.03
    # Those of the release's 16:9, and the nearest for others.
    assert bucket_size(16 / 9, 1024) == (768, 1360)
    assert bucket_size(1.0, 64) == (64, 64) and bucket_size(1.05, 64) == (64, 64)
    assert bucket_size(100.0, 1024) == bucket_size(2.0, 1024)
    assert bucket_size(1 / 1.77, 1024) == bucket_size(16 / 9, 1024)[::-1]


def test_the_digest_is_of_contents():
    first = [Prompt("a"), Prompt("b", 2.0)]
    assert list_digest(first) == list_digest(list(first))
    others = ([Prompt("a"), Prompt("b")], first[::-1], [Prompt("a"), Prompt("b", 2.0, "i.png")])
    assert len({list_digest(other) for other in (first, *others)}) == 4
