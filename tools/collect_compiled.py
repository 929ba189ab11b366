"""Collects reports of compiled programs into the tables of `docs/imagenet.md` and text networks'.

    python -m tools.collect_compiled             # rewrite the tables
    python -m tools.collect_compiled --check     # exit 1 if they are not what the reports say

Reports of `--mode=compile` in `docs/results/` are called `compile_<variant>-<anything>.json`, as in
`compile_gm_repa-v5e_4x4.json`, and make the table of `docs/imagenet.md`. Those of networks that
read text are in `docs/results/text_to_image/` as `<network>-<step or sampling>-<anything>.json`,
and make the table of `docs/text_to_image.md`. The tables are a pure function of the files.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.collect_reports import Report, ReportError, filled, run, table

NAME = re.compile(r"compile_(?P<variant>[a-z0-9_]+)-[\w-]+\.json")
TEXT_NAME = re.compile(r"(?P<network>\w+)-(?P<program>step|sampling)-[\w-]+\.json")
BEGIN, END = "<!-- compile:begin -->", "<!-- compile:end -->"
SCOPES = ("teacher", "student", "policy", "optimizer", "other")


def load_compiled(directory: Path) -> list[tuple[str, Report]]:
    """Reads the reports of `--mode=compile`.

    Args:
      directory: where the JSON files lie.

    Returns:
      Variant and report, by variant and slice; the plainest settings first.

    Raises:
      ReportError: a file's name or content is wrong.
    """
    called = "compile_<variant>-<anything>.json"
    found = _read(directory.glob("compile_*.json"), NAME, called, compiled_row)

    def order(item):
        variant, report = item
        plain = report["remat"] == "none", report["moment_dtype"] == "float32", _overlapped(report)
        return variant, report["topology"], [not value for value in plain]

    return sorted(found, key=order)


def _read(paths: Iterable[Path], name: re.Pattern, called: str, row: Callable) -> list[Any]:
    """What the names of files say of their reports, and then each report; `row` must take both."""
    found = []
    for path in sorted(paths):
        match = name.fullmatch(path.name)
        if match is None:
            raise ReportError(f"{path} is not called {called}")
        try:
            entry = *match.groups(), json.loads(path.read_text(encoding="utf-8"))
            row(*entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(
                f"{path} is not a report ({type(error).__name__}: {error})"
            ) from error
        found.append(entry)
    return found


def _overlapped(report: Report) -> bool:
    """Whether the compiler may split matrix products to send weights meanwhile (its default)."""
    return "windowed_einsum_mib=1000000" not in report.get("libtpu_flags", "")


def _rollout(report: Report) -> str:
    """Whether rollouts are loops, whose cycles are in the policy's share, or kernels."""
    return "loop" if report["cycles"]["rollouts"] else "kernel"


def _over_minimum(report: Report) -> str:
    """The estimate over the networks' arithmetic at the rate of large matrix products."""
    cycles = report["cycles"]
    return f"{cycles['total'] / cycles['minimum']:.2f}" if "minimum" in cycles else "-"


def _attention(report: Report) -> str:
    """Whether scores are arrays, or the tiles of a kernel, whose cycles are in no share."""
    return "kernel" if report.get("attention") == "splash" else "arrays"


def compiled_row(variant: str, report: Report) -> list[str]:
    """Cells of one compiled step."""
    memory, flops, cycles = report["memory_bytes"], report["flops"], report["cycles"]
    fits = "" if memory["peak"] <= memory["chip"] else ", does not fit"
    return [
        f"`{variant}`",
        report["topology"],
        str(report["devices"]),
        f"{report['batch_per_device']:g} in {report['microbatches']}",
        report["remat"],
        report["moment_dtype"],
        "on" if _overlapped(report) else "off",
        f"{memory['peak'] / 2**30:.2f} of {memory['chip'] / 2**30:.0f}{fits}",
        f"{flops['counted']:.3e}",
        f"{flops['ratio']:.3f}",
        f"{cycles['total']:.3e}",
        _over_minimum(report),
        *(f"{cycles['shares'][name]:.1%}" for name in SCOPES),
        _rollout(report),
        _attention(report),
    ]


def compiled_block(reports: Sequence[tuple[str, Report]]) -> str:
    """The text between the markers of `docs/imagenet.md`."""
    if not reports:
        return "No step has been compiled yet.\n"
    head = ["variant", "slice", "devices", "batch per device, in parts", "remat", "first moment"]
    head += [
        "collective matmul",
        "GiB per device",
        "FLOPs per step",
        "over the minimum",
        "cycles",
        "over those of the minimum",
        *SCOPES,
        "rollout",
        "attention",
    ]
    rows = [compiled_row(variant, report) for variant, report in reports]
    versions = dict.fromkeys(f"jax {r['jax']}, libtpu {r['libtpu']}" for _, r in reports)
    return "\n".join([*table(head, rows), "", f"Compiled with {'; '.join(versions)}.", ""])


def load_text_compiled(directory: Path) -> list[tuple[str, str, Report]]:
    """Reads the reports of `--mode=compile` and `--mode=compile_sampling` for text networks.

    Args:
      directory: where the JSON files lie.

    Returns:
      Network, program and report, by name of the file.

    Raises:
      ReportError: a file's name or content is wrong.
    """
    called = "<network>-<step or sampling>-<anything>.json"
    return _read(directory.glob("*.json"), TEXT_NAME, called, text_compiled_row)


def text_compiled_row(network: str, program: str, report: Report) -> list[str]:
    """Cells of one compiled program of a text network."""
    memory, flops, shares = report["memory_bytes"], report["flops"], report["cycles"]["shares"]
    fits = "" if memory["peak"] <= memory["chip"] else ", does not fit"
    parts = f" in {report['microbatches']}" if "microbatches" in report else ""
    return [
        f"`{network}`",
        program,
        report.get("base_dtype", "bfloat16"),
        report["topology"],
        " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items()) or "one chip",
        f"{report['batch_size']}{parts}",
        f"{memory['peak'] / 2**30:.1f} of {memory['chip'] / 2**30:.0f}{fits}",
        f"{memory['arguments'] / 2**30:.1f}",
        f"{flops['per_example'] / 1e12:,.0f}",
        _over_minimum(report),
        *(f"{shares[name]:.1%}" for name in ("teacher", "student", "policy")),
        _rollout(report),
        _attention(report),
    ]


def text_compiled_block(reports: Sequence[tuple[str, str, Report]]) -> str:
    """The text between the markers of `docs/text_to_image.md`."""
    if not reports:
        return "No program has been compiled yet.\n"
    head = ["network", "program", "base", "slice", "mesh", "images, in parts", "GiB per device"]
    head += ["of them arguments", "TFLOP per image", "cycles over those of the minimum"]
    head += ["teacher", "student", "policy", "rollout", "attention"]
    versions = dict.fromkeys(f"jax {r['jax']}, libtpu {r['libtpu']}" for *_, r in reports)
    rows = [text_compiled_row(*report) for report in reports]
    return "\n".join([*table(head, rows), "", f"Compiled with {'; '.join(versions)}.", ""])


def render(root: Path) -> dict[Path, str]:
    """Texts of the pages with the tables of today's reports, by path.

    Args:
      root: the repository.

    Returns:
      `docs/imagenet.md` and, if it has reports, `docs/text_to_image.md`.

    Raises:
      ReportError: a report cannot be used, or a page lacks its markers.
    """
    docs = root / "docs"
    blocks = {docs / "imagenet.md": compiled_block(load_compiled(docs / "results"))}
    text = docs / "results" / "text_to_image"
    if text.is_dir():
        blocks[docs / "text_to_image.md"] = text_compiled_block(load_text_compiled(text))
    return {
        page: filled(page.read_text(encoding="utf-8"), page, BEGIN, END, block)
        for page, block in blocks.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run(render, "python -m tools.collect_compiled", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
