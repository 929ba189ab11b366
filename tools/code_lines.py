"""Counts lines of code, without documentation, comments and blank lines.

    python tools/code_lines.py                          # piflow_jax by folder
    python tools/code_lines.py --against=81be43c        # and how many there were then
    python tools/code_lines.py piflow_jax tests tools   # several roots

A string that is a statement by itself counts as documentation. A comparison ends with the functions
and classes that there were then, which it follows by their names: a renamed one counts as gone.
"""

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
BLANK |= {tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Number of lines of a module's source that have code."""
    documentation = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        documents = token.type == tokenize.STRING and token.start[0] in documentation
        if token.type not in BLANK and not documents:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


Files = Sequence[tuple[PurePosixPath, str]]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def by_folder(files: Files) -> Counter[str]:
    """Lines of code of `(path, source)`, summed over the files of a root's folder."""
    counts: Counter[str] = Counter()
    for path, source in files:
        folder = path.parts[:2] if len(path.parts) > 2 else path.parts[:1]
        counts["/".join(folder)] += code_lines(source)
    return counts


def by_definition(files: Files) -> Counter[str]:
    """Lines of code of `(path, source)` by the names of functions, methods and classes.

    Methods count for themselves, and everything inside a function counts for the function. Equal
    names of different files are summed.
    """
    counts: Counter[str] = Counter()
    for _, source in files:
        lines = source.splitlines()

        def walk(nodes: Iterable[ast.AST], outer: str = "", lines=lines) -> int:
            whole = 0
            for node in (node for node in nodes if isinstance(node, Definition)):
                first = min(n.lineno for n in (node, *node.decorator_list))
                size = code_lines(textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])))
                inner = (
                    walk(node.body, f"{outer}{node.name}.") if isinstance(node, ast.ClassDef) else 0
                )
                counts[outer + node.name] += size - inner
                whole += size
            return whole

        walk(ast.parse(source).body)
    return counts


def now(root: Path, names: Sequence[str]) -> Files:
    """Files of the working tree."""
    paths = [path for name in names for path in sorted((root / name).rglob("*.py"))]
    return [
        (PurePosixPath(path.relative_to(root)), path.read_text(encoding="utf-8")) for path in paths
    ]


def then(root: Path, names: Sequence[str], revision: str) -> Files:
    """Files of a revision; a root that it lacks has none."""

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True).stdout

    held = git("ls-tree", "--name-only", revision, "--", *names).decode().split()
    if not held:
        return []
    with tarfile.open(fileobj=io.BytesIO(git("archive", revision, "--", *held))) as archive:
        members = [member for member in archive if member.name.endswith(".py")]
        return [
            (PurePosixPath(member.name), archive.extractfile(member).read().decode())
            for member in members
        ]


def table(counts: Counter[str], before: Counter[str] | None) -> str:
    """One line for each folder, and one for the total."""
    folders = sorted(counts.keys() | (before or {}).keys())
    width = max(map(len, [*folders, "total"]))
    lines = []
    for name in [*folders, "total"]:
        new = counts.total() if name == "total" else counts[name]
        line = f"{name:<{width}}  {new:>6,}"
        if before is not None:
            old = before.total() if name == "total" else before[name]
            line += f"  {old:>6,}  {new - old:>+6,}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("roots", nargs="*", default=["piflow_jax"], help="folders to count")
    parser.add_argument("--against", metavar="REVISION", help="a git revision to compare with")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    options = parser.parse_args(arguments)
    files, before = now(options.root, options.roots), None
    if options.against:
        try:
            before = then(options.root, options.roots, options.against)
        except subprocess.CalledProcessError as error:
            message = error.stderr.decode().strip()
            print(f"error: --against={options.against}: {message}", file=sys.stderr)
            return 2
    print(table(by_folder(files), None if before is None else by_folder(before)))
    if before is not None:
        old, new = by_definition(before), by_definition(files)
        kept = sum(new[name] for name in old)
        change = f"{old.total():,} lines then, {kept:,} now, {kept - old.total():+,}"
        print(f"functions and classes of {options.against}, by name: {change}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
