"""Weak scaling on paper: ImageNet's step compiled for slices of 8 to 1024 chips, and its bounds.

`python -m benchmarks.scaling v5e:2x4 v5p:8x8x16 'v6e:16x16*4'` compiles the step of
`configs/imagenet.py:gm_repa` for each slice with the same batch on every chip, and adds
FLOPs and bytes by collective to `benchmarks/results/scaling.json`; a slice takes four minutes of
a processor and 3 GB, whatever its size. `v5e:8x8@64` is another mesh than the configuration's, of
`fsdp = 64`. `python -m benchmarks.scaling` prints the table of `docs/scaling.md` from that file.

Times are bounds: FLOPs over the chip's peak, bytes over the bandwidth of all its links, or of its
share of the host's network between slices. Of the two efficiencies, the upper one takes transfers
to overlap with the arithmetic, the lower one to follow it.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax

from configs import imagenet
from piflow_jax.config import parse
from piflow_jax.modes.compile import compile_step
from piflow_jax.parallel.collectives import BETWEEN_SLICES
from piflow_jax.parallel.topology import CHIPS, gather_weights_whole, topology_devices

RESULT = Path(__file__).parent / "results" / "scaling.json"
# Examples on a chip, and parts that they go through the network in.
BATCH = {"v5e": (64, 4), "v5p": (256, 4), "v6e": (128, 4)}
GIB = 2**30


def measure(name: str) -> dict:
    """Compiles for one slice, such as `v5e:8x8`, or `v5e:8x8@64` for another `fsdp`."""
    topology, _, fsdp = name.partition("@")
    chips = len(topology_devices(topology))
    settings = imagenet.get_config("gm_repa")
    settings.topology = topology
    settings.mesh.fsdp = int(fsdp) if fsdp else settings.mesh.fsdp
    per_chip, parts = BATCH[topology.split(":")[0]]
    for batch in (settings.train, settings.teacher, settings.evaluation):
        batch.batch_size = chips * per_chip  # of the first alone is what is compiled
    settings.train.microbatches = parts
    with tempfile.TemporaryDirectory() as folder:
        report = compile_step(parse(settings, None), folder)
    return {
        "chips": chips,
        "fsdp": report["mesh"].get("fsdp", 1),
        "batch_per_chip": per_chip,
        "memory": report["memory_bytes"]["peak"],
        "flops": report["flops"]["counted"] / chips,
        "bytes": report["collective_bytes"],
        "jax": report["jax"],
        "libtpu": report["libtpu"],
    }


def table(results: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| slice | chips | fsdp x data | batch per chip | GiB | TFLOP per chip | GB gathered | "
        "GB reduced | GB other | GB between slices | arithmetic, ms | links, ms | network, ms | "
        "efficiency |",
        "| --- |" + " ---: |" * 13,
    ]
    for name in sorted(results, key=lambda name: _order(name, results[name])):
        row, topology = results[name], name.partition("@")[0]
        chip, sent = CHIPS[topology.split(":")[0]], dict(row["bytes"])
        network = sent.pop(BETWEEN_SLICES, 0)
        inside = sum(sent.values())
        gathered = sent.pop("all-gather", 0)
        reduced = sent.pop("reduce-scatter", 0) + sent.pop("all-reduce", 0)
        times = (row["flops"] / chip.flops, inside / chip.links, network / chip.network)
        low, high = times[0] / sum(times), times[0] / max(times)
        cells = [
            topology,
            row["chips"],
            f"{row['fsdp']} x {row['chips'] // row['fsdp']}",
            row["batch_per_chip"],
            f"{row['memory'] / GIB:.1f}",
            f"{row['flops'] / 1e12:.1f}",
            *(f"{n / 1e9:.2f}" for n in (gathered, reduced, sum(sent.values()), network)),
            *(f"{1e3 * time:.1f}" for time in times),
            f"{low:.0%} to {high:.0%}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    versions = sorted({(row["jax"], row["libtpu"]) for row in results.values()})
    lines += ["", "Compiled with " + "; ".join(f"jax {j}, libtpu {t}" for j, t in versions) + "."]
    return "\n".join(lines)


def _order(name: str, row: dict) -> tuple:
    """By chip and size; the configuration's own mesh before another."""
    return name.split(":")[0], row["chips"], "@" in name


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slices", nargs="*", metavar="SLICE[@FSDP]")
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    gather_weights_whole()  # as in a run
    for name in parser.parse_args().slices:
        results[name] = measure(name)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
        jax.clear_caches()
    print(table(results))


if __name__ == "__main__":
    main()
