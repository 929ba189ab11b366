"""What skipping the unconditional half outside the guidance interval could save, by batch.

    python -m benchmarks.guidance_interval

Outside the interval the teacher's unconditional half is not used. A program of static shapes can
evaluate it for a part of the batch only, the capacity, after moving the samples that need it to the
front; in the rare batch that has more of them it has to evaluate all. With one evaluation and no
mixing the times of all states are independent and uniform, so their number is binomial, and the
capacity here is what is exceeded in one step of a million. Savings are of the arithmetic minimum of
a step, of `configs/imagenet.py:gm_repa` unless another is given; nothing is timed.
"""

import argparse

from scipy.stats import binom

from benchmarks import harness
from benchmarks.train_step import Subject, load_config
from piflow_jax.config import parse

EXCEEDED = 1e-6
BATCHES = (16, 64, 128, 256, 1024)


def savings(config) -> dict:
    """Capacity and saving by the number of examples that a device evaluates at once."""
    low, high = config.teacher.guidance_interval
    inside = high - low
    found = Subject(config, "student").flops().by_scope
    # Of the unconditional half.
    share = found["teacher"] / 2 / (found["teacher"] + found["student"])
    rows = {}
    for batch in BATCHES:
        queries = batch * config.train.num_states
        capacity = int(binom.isf(EXCEEDED, queries, inside))
        rows[batch] = {"capacity": capacity / queries, "saved": share * (1 - capacity / queries)}
    return {"needed": inside, "at_most": share * (1 - inside), "by_batch": rows}


def table(found: dict) -> str:
    """The savings as a Markdown table."""
    lines = [
        "| examples at once on a device | evaluated without condition | saved of a step's FLOPs |",
        "| ---: | ---: | ---: |",
    ]
    for batch, row in found["by_batch"].items():
        lines.append(f"| {batch} | {row['capacity']:.1%} | {row['saved']:.1%} |")
    lines.append(f"| without end | {found['needed']:.1%} | {found['at_most']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the calculation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/imagenet.py:gm_repa")
    found = savings(parse(load_config(parser.parse_args().config)))
    harness.write("guidance_interval", found)
    print(table(found))


if __name__ == "__main__":
    main()
