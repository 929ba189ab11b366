"""Puts a run's student and teacher into the package, in bfloat16, with a model card.

    python -m piflow_jax.main --config=configs/fashion_mnist.py --workdir=RUN
    python -m piflow_jax.main --config=configs/fashion_mnist.py --workdir=RUN --mode=export
    python tools/ship.py RUN fashion_mnist --student corrected=CONTINUED

`--student` adds a student of the same teacher, from a run of the variant `gm_<recipe>` that
continued RUN and was exported too. The card's figures are those of the runs' `report.json`, which
were measured in float32.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from piflow_jax.convert import open_weights, write_safetensors

ROOT = Path(__file__).resolve().parents[1]
DATA = {
    "fashion_mnist": (
        "Fashion-MNIST",
        "[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (MIT licence): 60,000 "
        "grey training images of 28x28 pixels in ten classes of clothing",
    ),
}
LIMIT = 3 * 2**20
FIGURES = ("frechet", "precision", "recall", "diversity")

CARD = """\
# {title}: a student of one evaluation and its teacher

```python
student = piflow_jax.load("{name}")
teacher, params = piflow_jax.load_teacher("{name}")
{others}```

* **Data.** {data}.
* **Licence.** That of this package, Apache 2.0.
* **Recipe.** `python -m piflow_jax.main --config=configs/{name}.py --workdir=RUN`, seed {seed}.
  The weights are the averages of the last checkpoint, rounded to bfloat16.
{continued}* **Limits.** They show what the method does on small images, and are of no other use.
  Students were trained for one evaluation.

Figures of the run ({samples} samples against {real} images, features {features}):

| system | NFE | Frechet | precision | recall | diversity |
| --- | ---: | ---: | ---: | ---: | ---: |
{rows}
"""

CONTINUED = """\
* **{name}_{recipe}.** It continues the student by `--config=configs/{name}.py:gm_{recipe}`.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `piflow_jax/shipped/<name>/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("name", choices=DATA)
    parser.add_argument("--to", type=Path, default=ROOT / "piflow_jax" / "shipped")
    parser.add_argument("--student", action="append", default=[], metavar="RECIPE=RUN")
    args = parser.parse_args(argv)
    others = {recipe: Path(run) for recipe, run in (one.split("=", 1) for one in args.student)}
    folder = args.to / args.name
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("student", "teacher"):
        _round(args.workdir / f"{kind}.safetensors", folder / f"{kind}.safetensors")
    for recipe, run in others.items():
        _round(run / "student.safetensors", folder / f"student_{recipe}.safetensors")
    reports = {recipe: _report(run) for recipe, run in {"": args.workdir, **others}.items()}
    (folder / "README.md").write_text(card(args.name, reports), encoding="utf-8")


def _report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def _round(source: Path, path: Path) -> None:
    weights = open_weights(source)
    arrays = {name: np.asarray(leaf).astype(ml_dtypes.bfloat16) for name, leaf in weights.items()}
    write_safetensors(path, arrays, weights.metadata)
    if path.stat().st_size > LIMIT:
        raise SystemExit(f"{path} has more than {LIMIT >> 20} MiB")


def card(name: str, reports: dict[str, dict[str, Any]]) -> str:
    """The model card of runs' reports, by recipe; that of the run itself has the key ""."""
    title, data = DATA[name]
    report = reports[""]
    protocol = report["protocol"]
    others = [recipe for recipe in reports if recipe]

    def row(system: str, nfe: Any, figures: dict[str, float]) -> str:
        cells = [system, str(nfe or "-"), *(f"{figures[key]:.3f}" for key in FIGURES)]
        return f"| {' | '.join(cells)} |"

    measured = [(one["system"], one) for one in report["rows"]]
    for recipe in others:
        students = [one for one in reports[recipe]["rows"] if one["system"] == "student"]
        measured[-1:-1] = [(f"student, {recipe}", one) for one in students]  # the data stays last
    rows = [row(system, one["nfe"], one["figures"]) for system, one in measured]
    return CARD.format(
        title=title,
        name=name,
        data=data,
        seed=protocol["seed"],
        samples=f"{protocol['samples']:,}",
        real=f"{protocol['real_images']:,} {protocol['real_split']}",
        features=protocol["features_sha256"][:8],
        others="".join(f'{recipe} = piflow_jax.load("{name}_{recipe}")\n' for recipe in others),
        continued="".join(CONTINUED.format(name=name, recipe=recipe) for recipe in others),
        rows="\n".join(rows),
    )


if __name__ == "__main__":
    main()
