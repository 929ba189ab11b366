"""Lines of code: what is counted, and against what."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "code_lines", Path(__file__).parents[1] / "tools" / "code_lines.py"
)
code_lines = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(code_lines)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("", 0),
        ("# a comment\n\nx = 1  # with another\n", 1),
        ('"""Of two\nlines."""\n\nx = 1\n"""Of an attribute."""\n', 1),
        ('def f():\n    """Says what."""\n    return 1\n', 2),
        ('def f(): "Says what."\n', 1),
        ('x = """\n\nthree lines"""\n', 3),
        ("f(\n    1,\n    # why\n    2,\n)\n", 4),
        ("class A:\n    'documented' ' in two'\n\n    x: int\n", 2),
    ],
)
def test_documentation_comments_and_blanks_are_no_code(source, count):
    assert code_lines.code_lines(source) == count


def test_folders_are_compared_with_a_revision(tmp_path, capsys):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*command, *arguments], check=True, capture_output=True)

    def write(name, lines):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" * lines)

    git("init")
    write("house/a/one.py", 3)
    write("house/b/deep/two.py", 5)
    git("add", ".")
    git("commit", "-m", "first")
    write("house/a/one.py", 1)
    write("house/three.py", 2)
    write("other/four.py", 7)
    (tmp_path / "house/b/deep/two.py").unlink()
    arguments = [f"--root={tmp_path}", "--against=HEAD", "house", "other"]
    assert code_lines.main(arguments) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table.pop()[-6:] == ["0", "lines", "then,", "0", "now,", "+0"]
    assert table == [
        ["house", "2", "0", "+2"],
        ["house/a", "1", "3", "-2"],
        ["house/b", "0", "5", "-5"],
        ["other", "7", "0", "+7"],
        ["total", "10", "8", "+2"],
    ]
    assert code_lines.main([*arguments[:1], "--against=nothing", "house"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_what_existed_is_followed_by_name():
    """A method and a decorator count once, a new function and a line outside of all not at all."""
    then = """
import functools
class A:
    x = 1
    @functools.cache
    def f(self):
        def inner():
            pass
        return inner
def gone():
    pass
"""
    now = """
class A:
    x = 1
    def f(self):
        "Documented."
        return 1
def new():
    pass
y = 2
"""
    old, new = (code_lines.by_definition([(Path("a.py"), text)]) for text in (then, now))
    assert old == {"A": 2, "A.f": 5, "gone": 2}
    assert new == {"A": 2, "A.f": 2, "new": 2}
