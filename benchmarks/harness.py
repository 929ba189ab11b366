"""Timings that can be compared: alternatives by turns, medians, spread, the machine and its peaks.

Every benchmark states its work, measures what the machine can do at most in the same run, and runs
its alternatives one after the other in each of many rounds, so that what else the machine is doing
falls on all of them; those that need the memory to themselves run in a process each. Ratios are
medians of the rounds' ratios. What was measured is kept in `benchmarks/results/<subject>.json`, by
the machine's hardware and by case; `table` shows a case.
"""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "Peaks",
    "Work",
    "apart",
    "compare",
    "compare_apart",
    "load",
    "machine",
    "measured_peaks",
    "save",
    "settle",
    "table",
    "torch_device",
    "tune_allocator",
    "write",
]

# A machine that hands back files of one folder only has them there.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
# glibc returns large blocks to the system at once and takes a page fault for each page of the next;
# PyTorch, which allocates for every operation, runs three times slower for it.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    # What another alternative is to use of a GPU cannot be JAX's already.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one call does, the same for all alternatives of a case.

    Attributes:
      items: how many of `unit`.
      unit: what is counted, such as `examples`.
      flops: the least arithmetic that the result needs; 0 if it is not counted.
      bytes: the least memory traffic that the result needs; 0 if it is not counted.
      dtype: of the arithmetic, a key of `Peaks.flops`.
    """

    items: int
    unit: str
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """What the default device does at most, as measured.

    Attributes:
      bytes: bytes per second through memory, read and written.
      flops: FLOPs per second of a large matrix product by dtype.
    """

    bytes: float
    flops: Mapping[str, float]


def tune_allocator() -> None:
    """Starts the program again with an allocator that keeps large blocks, unless it has one.

    On a GPU JAX then takes memory only as it needs it. All this is read only at the start. Call it
    before anything is computed.
    """
    if sys.platform == "linux" and any(os.environ.get(k) != v for k, v in _ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _ALLOCATOR)


def machine() -> dict[str, Any]:
    """The hardware: `cpu`, `cores`, `memory_gib` and, if there is one, `accelerator`."""
    cpu = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": cpu, "cores": cores, "memory_gib": round(memory / 2**30)}
    device = jax.devices()[0]
    if device.platform != "cpu":
        found["accelerator"] = f"{jax.device_count()} x {device.device_kind}"
    return found


def torch_device() -> str | None:
    """PyTorch's name of JAX's default device; without one the reason is printed.

    Returns:
      `cpu` or `cuda`; None if PyTorch is not installed, or cannot use what JAX does: a comparison
      of two devices says nothing of the programs.
    """
    platform = jax.default_backend()
    if importlib.util.find_spec("torch") is None:
        reason = 'it is not installed; pip install -e ".[peers]"'
    elif platform == "cpu":
        return "cpu"
    elif platform != "gpu":
        reason = f"it has no {platform}"
    else:
        import torch

        if torch.cuda.is_available():
            return "cuda"
        reason = f"its build {torch.__version__} cannot use the GPU; install one for CUDA"
    print(f"PyTorch is left out: {reason}", file=sys.stderr)
    return None


def settle(result: Any) -> Any:
    """Waits for what a call has started, on JAX's devices and on PyTorch's, and returns it."""
    jax.block_until_ready(result)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    settle(call())
    return time.perf_counter() - start


def measured_peaks(dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Peaks:
    """Measures what the default device does at most: the best of twelve runs.

    Float32 products are true ones, without TF32. Traffic is that of `a <- a + 2 b` in place.
    """
    accelerated = jax.default_backend() != "cpu"
    length, size = (2**28, 8192) if accelerated else (2**25, 1024)
    add = jax.jit(lambda a, b: a + 2 * b, donate_argnums=0)
    a, b = jnp.ones(length, jnp.float32), jnp.ones(length, jnp.float32)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a = settle(add(a, b))
        best = min(best, time.perf_counter() - start)
    flops = {}
    for dtype in dtypes:
        matrix = jnp.ones((size, size), dtype)
        product = jax.jit(lambda m: jnp.matmul(m, m, precision="highest"))
        least = min(_seconds(lambda p=product, m=matrix: p(m)) for _ in range(12))
        flops[dtype] = 2 * size**3 / least
    return Peaks(bytes=3 * a.nbytes / best, flops=flops)


def compare(
    builders: Mapping[str, Callable[[], Callable[[], Any]]],
    work: Work,
    peaks: Peaks | None = None,
    *,
    rounds: int = 20,
) -> dict[str, Any]:
    """Times alternatives by turns, in this process.

    One that fails is left out, and the reason is printed and kept.

    Args:
      builders: what makes the calls, by name; the first is what the others are compared with. What
        a call returns is waited for.
      work: what each of them does.
      peaks: what the machine does at most; without it no bound is given.
      rounds: how often each is timed, after two calls that are not.

    Returns:
      A case for `save` and `table`: for every alternative `first_seconds` (the first call, with its
      compilation), `median_seconds`, `least_seconds`, `spread` (between the quartiles, over the
      median) and `ratio` (the median over rounds of its time over the first alternative's); the
      work, `bound_seconds` and what the bound is; `left_out`, reasons by name.

    Raises:
      SystemExit: every alternative failed.
    """
    calls, first, left_out = {}, {}, {}
    times: dict[str, list[float]] = {}
    for name, build in builders.items():
        try:
            call = build()
            first[name] = _seconds(call)
            settle(call())
            calls[name], times[name] = call, []
        except Exception as error:
            left_out[name] = _reason(name, error)
    for _ in range(rounds):
        for name, call in list(calls.items()):
            try:
                times[name].append(_seconds(call))
            except Exception as error:
                left_out[name] = _reason(name, error)
                del calls[name], times[name]
    return _case(first, times, left_out, work, peaks)


def compare_apart(
    builders: Mapping[str, Callable[[], Callable[[], Any]]],
    work: Work,
    peaks: Peaks | None = None,
    *,
    rounds: int = 20,
) -> dict[str, Any]:
    """Times alternatives one after the other, each in a process of its own.

    Neither JAX nor PyTorch gives all memory of a GPU back before its process ends.

    Args:
      builders: what makes the calls, by name, to be pickled; see `compare` for these and the rest.
      work: what each of them does.
      peaks: what the machine does at most; of `apart(measured_peaks)`, for memory.
      rounds: how often each is timed.

    Returns:
      A case, as `compare` makes.

    Raises:
      SystemExit: every alternative failed.
    """
    first, times, left_out = {}, {}, {}
    for name, build in builders.items():
        try:
            first[name], times[name] = apart(_timed, build, rounds)
        except Exception as error:
            left_out[name] = _reason(name, error)
    return _case(first, times, left_out, work, peaks)


def apart(function: Callable, *arguments: Any) -> Any:
    """What a function returns, or raises, in a process of its own; all of it is pickled."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_reported, function, *arguments).result()


def _reported(function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # those of C++ cannot always be pickled
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _timed(build: Callable[[], Callable[[], Any]], rounds: int) -> tuple[float, list[float]]:
    call = build()
    first = _seconds(call)
    settle(call())
    return first, [_seconds(call) for _ in range(rounds)]


def _reason(name: str, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, RuntimeError):  # as those of devices and of other processes are
        reason = f"{type(error).__name__}: {reason}"
    print(f"{name} is left out: {reason}", file=sys.stderr)
    return reason


def _case(first, times, left_out, work: Work, peaks: Peaks | None) -> dict[str, Any]:
    if not times:
        raise SystemExit("every alternative failed, for the reasons above; nothing was measured")
    base = next(iter(times.values()))
    rows = {}
    for name, found in times.items():
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        rows[name] = {
            "first_seconds": first[name],
            "median_seconds": median,
            "least_seconds": min(found),
            "spread": (high - low) / median,
            "ratio": statistics.median(t / b for t, b in zip(found, base, strict=True)),
        }
    case = {"work": dataclasses.asdict(work), "rounds": len(base), "alternatives": rows}
    if left_out:
        case["left_out"] = left_out
    if peaks is not None:
        case |= {"peaks": dataclasses.asdict(peaks)} | _bound(work, peaks)
    return case


def _bound(work: Work, peaks: Peaks) -> dict[str, Any]:
    bounds = {
        "bytes": work.bytes / peaks.bytes,
        f"{work.dtype} FLOPs": work.flops / peaks.flops[work.dtype],
    }
    name = max(bounds, key=bounds.get)
    return {"bound": name, "bound_seconds": bounds[name]} if bounds[name] else {}


def table(case: Mapping[str, Any]) -> str:
    """A case as a Markdown table."""
    work, bound = case["work"], case.get("bound_seconds")
    base = next(iter(case["alternatives"]))
    lines = [
        f"| | median, ms | least, ms | spread | {work['unit']} / s | of the bound | "
        f"first call, s | time over that of {base} |",
        "| --- |" + " ---: |" * 7,
    ]
    for name, row in case["alternatives"].items():
        cells = [
            name,
            f"{1e3 * row['median_seconds']:.4g}",
            f"{1e3 * row['least_seconds']:.4g}",
            f"{row['spread']:.0%}",
            f"{work['items'] / row['median_seconds']:.4g}",
            f"{bound / row['median_seconds']:.1%}" if bound else "-",
            f"{row['first_seconds']:.3g}",
            f"{row['ratio']:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name, reason in case.get("left_out", {}).items():
        lines += ["", f"Left out: {name} ({reason})"]
    return "\n".join(lines)


def load(subject: str) -> dict[str, Any]:
    """What is kept of a subject: cases by the machine's name; empty if there is nothing."""
    path = RESULTS / f"{subject}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def where(found: Mapping[str, Any]) -> str:
    """Words for the `machine` and the `versions` of a result."""
    machine = found["machine"]
    return f"on {machine['cpu']}, {machine['cores']} cores (jax {found['versions']['jax']})"


def write(subject: str, content: Mapping[str, Any]) -> None:
    """Writes `benchmarks/results/<subject>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{subject}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save(subject: str, name: str, case: Mapping[str, Any], **about: Any) -> None:
    """Keeps a case in `benchmarks/results/<subject>.json`, and prints its table.

    Args:
      subject: the benchmark's.
      name: the case's; an older one of the same name on the same hardware is replaced.
      case: what `compare` made.
      **about: settings and figures of the case, as JSON.
    """
    hardware = machine()
    label = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    if "accelerator" in hardware:
        label = f"{hardware['accelerator']} ({label})"
    versions = {"jax": jax.__version__}
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    kept = load(subject)
    kept.setdefault(label, {})[name] = {"versions": versions, **about, **case}
    write(subject, kept)
    print(f"{name} on {label}\n\n{table(case)}\n")
