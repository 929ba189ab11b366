"""Puts a run's student and teacher into the package, in bfloat16, with a model card.

    python -m piflow_jax.main --config=configs/fashion_mnist.py --workdir=RUN
    python -m piflow_jax.main --config=configs/fashion_mnist.py --workdir=RUN --mode=export
    python tools/ship.py RUN fashion_mnist

The card's figures are those of the run's `report.json`, which were measured in float32.
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
```

* **Data.** {data}.
* **Licence.** That of this package, Apache 2.0.
* **Recipe.** `python -m piflow_jax.main --config=configs/{name}.py --workdir=RUN`, seed {seed}.
  The weights are the averages of the last checkpoint, rounded to bfloat16.
* **Limits.** They show what the method does on small images, and are of no other use. The student
  was trained for one evaluation.

Figures of the run ({samples} samples against {real} images, features {features}):

| system | NFE | Frechet | precision | recall | diversity |
| --- | ---: | ---: | ---: | ---: | ---: |
{rows}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `piflow_jax/shipped/<name>/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("name", choices=DATA)
    parser.add_argument("--to", type=Path, default=ROOT / "piflow_jax" / "shipped")
    args = parser.parse_args(argv)
    folder = args.to / args.name
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("student", "teacher"):
        weights = open_weights(args.workdir / f"{kind}.safetensors")
        arrays = {
            name: np.asarray(leaf).astype(ml_dtypes.bfloat16) for name, leaf in weights.items()
        }
        path = folder / f"{kind}.safetensors"
        write_safetensors(path, arrays, weights.metadata)
        if path.stat().st_size > LIMIT:
            raise SystemExit(f"{path} has more than {LIMIT >> 20} MiB")
    report = json.loads((args.workdir / "report.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(card(args.name, report), encoding="utf-8")


def card(name: str, report: dict[str, Any]) -> str:
    """The model card of a run's report."""
    title, data = DATA[name]
    protocol = report["protocol"]

    def row(system: str, nfe: Any, figures: dict[str, float]) -> str:
        cells = [system, str(nfe or "-"), *(f"{figures[key]:.3f}" for key in FIGURES)]
        return f"| {' | '.join(cells)} |"

    rows = [row(one["system"], one["nfe"], one["figures"]) for one in report["rows"]]
    return CARD.format(
        title=title,
        name=name,
        data=data,
        seed=protocol["seed"],
        samples=f"{protocol['samples']:,}",
        real=f"{protocol['real_images']:,} {protocol['real_split']}",
        features=protocol["features_sha256"][:8],
        rows="\n".join(rows),
    )


if __name__ == "__main__":
    main()
