"""Fills the tables of `docs/performance.md` from `benchmarks/results/`.

    python -m benchmarks.page

writes them; with `--check` it writes nothing and fails if the page is stale, as a test does.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import bucket, guidance_interval, harness, main_job, sampler, substeps

NOTHING = "Nothing has been measured yet."
SUBJECTS = ("rollout", "sampler", "train_step", "data", "decode")
# Subjects with a table of their own.
TABLES = {
    "guidance_interval": guidance_interval.table,
    "substeps": lambda found: substeps.table(found["students"]),
    "main_job": main_job.table,
    "bucket": bucket.table,
}


def block(subject: str) -> str:
    """All cases of a subject as Markdown, machine by machine."""
    parts = []
    for machine, cases in harness.load(subject).items():
        for name, case in cases.items():
            versions = ", ".join(f"{key} {value}" for key, value in case["versions"].items())
            about = f"{case['rounds']} rounds; {versions}"
            if "bound_seconds" in case:
                about += f"; bound by {case['bound']}, {_peak(case)} measured in the same run"
            parts.append(f"**{name}**, on {machine} ({about}):\n\n{harness.table(case)}\n")
            share = sampler.policy_share(case)
            parts += [share] if share else []
    return "\n".join(parts) or f"{NOTHING}\n"


def _peak(case) -> str:
    if case["bound"] == "bytes":
        return f"{case['peaks']['bytes'] / 1e9:.3g} GB/s"
    return f"{case['peaks']['flops'][case['work']['dtype']] / 1e9:.4g} GFLOP/s"


def render(text: str) -> str:
    """The page's text with its tables made anew."""
    blocks = {subject: block(subject) for subject in SUBJECTS}
    for subject, table in TABLES.items():
        found = harness.load(subject)
        blocks[subject] = (table(found) if found else NOTHING) + "\n"
    for subject, new in blocks.items():
        begin, end = f"<!-- {subject}:begin -->\n", f"<!-- {subject}:end -->"
        before, rest = text.split(begin)
        text = before + begin + new + end + rest.split(end)[1]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    default = Path(__file__).parents[1] / "docs" / "performance.md"
    parser.add_argument("--page", type=Path, default=default)
    options = parser.parse_args(arguments)
    text = options.page.read_text(encoding="utf-8")
    new = render(text)
    if new == text:
        return 0
    if options.check:
        print(f"{options.page} is stale; run: python -m benchmarks.page", file=sys.stderr)
        return 1
    options.page.write_text(new, encoding="utf-8")
    print(f"wrote {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
