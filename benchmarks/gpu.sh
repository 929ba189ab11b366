#!/usr/bin/env bash
# All that a GPU is needed for, in under 9 minutes on one H100 or H200 with jax installed.
#
#   benchmarks/gpu.sh              on the GPU; results go to $OUT, or to benchmarks/results
#   benchmarks/gpu.sh --missing    names the packages that this Python lacks
#   benchmarks/gpu.sh --dry        every step at a size for a CPU; results go to a temporary folder
#
# Steps run in the order of their worth, each with its own limit, so that a cut loses the least; one
# that fails does not stop the next. Where no package can be fetched, lay pure-Python wheels into
# `wheels/` first: pip download --no-deps -d wheels NAME... with the names of --missing.
# Afterwards `python -m benchmarks.page` puts the results into docs/performance.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

missing() {
  python3 - <<'PYTHON'
from importlib.util import find_spec

# Modules that the steps below import, by the names of their packages.
packages = {
    "absl-py": "absl", "einops": "einops", "etils": "etils", "flax": "flax", "jax": "jax",
    "ml-collections": "ml_collections", "optax": "optax", "orbax-checkpoint": "orbax",
    "pytest": "pytest", "pytest-xdist": "xdist", "tqdm": "tqdm", "numpy": "numpy", "pillow": "PIL",
    "scikit-learn": "sklearn", "safetensors": "safetensors",
}
print(*[name for name, module in packages.items() if find_spec(module) is None])
PYTHON
}

case "${1:-}" in
  --missing) missing; exit 0 ;;
  --dry) dry=1 ;;
  "") dry= ;;
  *) echo "error: unknown option $1; see the head of $0" >&2; exit 2 ;;
esac

if [[ -d wheels ]]; then
  python3 -m pip install --quiet --no-index --no-deps --find-links wheels wheels/*.whl || exit 2
fi
absent="$(missing)"
if [[ -n "$absent" ]]; then
  echo "error: missing here: $absent; see the head of $0 for how to carry them" >&2
  exit 2
fi

temporary="$(mktemp -d)"
trap 'rm -rf "$temporary"' EXIT
export JAX_COMPILATION_CACHE_DIR="$temporary/cache" PYTHONUNBUFFERED=1
imagenet=--config=configs/imagenet.py:gm_repa
if [[ -n "$dry" ]]; then
  export BENCHMARK_RESULTS="$temporary" JAX_PLATFORMS=cpu
  gpu_tests=(--collect-only) rounds=--rounds=2 rollouts=(--case=digits)
  samples=(--config=configs/digits.py --batch-size=4 --substeps=8)
  steps=(--config=configs/digits.py --batch-size=4 --stage student)
else
  export BENCHMARK_RESULTS="${OUT:-benchmarks/results}"
  if [[ -n "${OUT:-}" ]]; then
    # A case replaces its like in what is there, so that other machines' figures stay.
    cp benchmarks/results/{rollout,sampler,train_step}.json "$OUT"
  fi
  gpu_tests=() rounds=--rounds=8 rollouts=()
  samples=("$imagenet" --batch-size=64)
  steps=("$imagenet" --batch-size=128)
fi

failed=()
step() { # NAME SECONDS COMMAND...
  local name="$1" limit="$2" began=$SECONDS status=0
  shift 2
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" || status=$?
  echo "== $name: status $status after $((SECONDS - began)) s"
  [[ $status == 0 ]] || failed+=("$name ($status)")
}

step tests 150 python3 -m pytest -q -n 0 -p no:cacheprovider -m gpu "${gpu_tests[@]}" \
  tests/flow/test_fused.py tests/kernels/test_kernels.py tests/models/test_attention.py \
  tests/training/test_step.py tests/parallel/test_flops.py
step rollout 80 python3 -m benchmarks.rollout "${rollouts[@]}" "$rounds"
step sampler 80 python3 -m benchmarks.sampler "${samples[@]}" --solver multistep "$rounds"
step train_step 120 python3 -m benchmarks.train_step "${steps[@]}" --no-torch "$rounds"
step train_step_beside_pytorch 90 python3 -m benchmarks.train_step "${steps[@]}" "$rounds"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
