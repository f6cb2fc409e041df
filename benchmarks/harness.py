"""What every benchmark shares: the GPU check, the machine's description, timing, and accuracy.

Used by bench_*.py; the competitors are in peers.py, tables and plots in report.py.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SLEEP_CYCLES_PER_CALL = 150_000  # about 80 us: longer than the host needs to issue one call


def require_gpu() -> None:
    """Ends the program with status 2 where there is nothing to measure."""
    if not torch.cuda.is_available():
        print("This benchmark needs an NVIDIA GPU: torch.cuda.is_available() is False here.")
        raise SystemExit(2)
    if torch.cuda.get_device_capability()[0] < 8:
        print(f"This benchmark needs compute capability 8.0: {torch.cuda.get_device_name()}.")
        raise SystemExit(2)


@dataclass(frozen=True)
class Contestant:
    """One implementation, ready to run on one problem's tensors.

    scope: entered around every burst of calls, outside the timed region (backend selection).
    """

    name: str
    call: Callable[[], Tensor]
    scope: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over all rounds."""

    median_us: float
    fastest_us: float
    slowest_us: float
    calls: int


def _burst(contestant: Contestant, calls: int) -> list[float]:
    """GPU microseconds of each of `calls` calls in a row.

    A spin kernel first keeps the GPU busy while the host issues the calls, so that the events
    bracket GPU work alone, also for kernels that are shorter than their launch.
    """
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    with torch.no_grad(), contestant.scope():
        torch.cuda._sleep(SLEEP_CYCLES_PER_CALL * (calls + 1))
        for start, end in zip(starts, ends, strict=True):
            start.record()
            contestant.call()
            end.record()
        torch.cuda.synchronize()
    return [s.elapsed_time(e) * 1e3 for s, e in zip(starts, ends, strict=True)]


def measure(
    contestants: Sequence[Contestant], rounds: int = 5, burst_us: float = 10_000.0
) -> dict[str, Timing]:
    """Times the contestants in interleaved rounds, each round starting with another one.

    Interleaving gives all of them the same share of the GPU's clock and power states; each burst
    lasts about `burst_us`. The L2 cache stays warm: the tensors are far larger than it.
    """
    samples: dict[str, list[float]] = {c.name: [] for c in contestants}
    lengths = {}
    for contestant in contestants:  # warm-up: compilers, heuristics, allocator
        once = statistics.median(_burst(contestant, 3))
        lengths[contestant.name] = max(3, min(20, round(burst_us / max(once, 1.0))))
    for turn in range(rounds):
        shift = turn % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            samples[contestant.name] += _burst(contestant, lengths[contestant.name])
    return {
        name: Timing(statistics.median(us), min(us), max(us), len(us))
        for name, us in samples.items()
    }


def measure_guarded(
    contestants: Sequence[Contestant], rounds: int = 5, burst_us: float = 10_000.0
) -> tuple[dict[str, Timing], dict[str, str]]:
    """`measure`, and notes on those that failed. After a failure each is timed alone."""
    if not contestants:
        return {}, {}
    try:
        return measure(contestants, rounds, burst_us), {}
    except Exception:
        timings: dict[str, Timing] = {}
        notes = {}
        for contestant in contestants:
            try:
                timings |= measure([contestant], rounds, burst_us)
            except Exception as error:
                notes[contestant.name] = brief(error)
        return timings, notes


def gpu_answers() -> bool:
    """False once any kernel of this process has failed: from then on every call does."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda")
    except Exception:
        return False
    return True


def brief(error: BaseException) -> str:
    """The first line of a message, cut where it becomes a page."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def run_once(contestant: Contestant) -> Tensor:
    with torch.no_grad(), contestant.scope():
        return contestant.call()


@dataclass(frozen=True)
class Accuracy:
    """Largest error over the sampled heads, beside PyTorch's own in the same dtype."""

    error: float
    pytorch_error: float

    @property
    def good(self) -> bool:
        return self.error <= 2 * self.pytorch_error + 1e-5


class Oracle:
    """float32 attention of a few sampled (batch, head) pairs; equal head counts, equal lengths."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
        batch, _, num_heads, head_dim_qk = q.shape
        middle = (batch // 2, num_heads // 2)
        self.samples = sorted({(0, 0), middle, (batch - 1, num_heads - 1)})
        self.expected, self.pytorch_error = [], 0.0
        for b, h in self.samples:
            inputs = [x[b, :, h] for x in (q, k, v)]
            exact = _attention([x.float() for x in inputs], head_dim_qk**-0.5, causal)
            low_precision = _attention(inputs, head_dim_qk**-0.5, causal)
            self.expected.append(exact)
            self.pytorch_error = max(self.pytorch_error, largest(low_precision.float() - exact))

    def check(self, out: Tensor) -> Accuracy:
        """out: (batch, seqlen, num_heads, head_dim_v). Non-finite anywhere counts as wrong."""
        errors = [
            largest(out[b, :, h].float() - exact)
            for (b, h), exact in zip(self.samples, self.expected, strict=True)
        ]
        finite = bool(torch.isfinite(out).all())
        return Accuracy(max(errors) if finite else float("inf"), self.pytorch_error)


def _attention(inputs: Sequence[Tensor], scale: float, causal: bool) -> Tensor:
    q, k, v = inputs
    scores = (q @ k.T).mul_(scale)
    if causal:
        hidden = torch.ones(scores.shape, dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, -1) @ v


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def mean_difference(a: Tensor, b: Tensor) -> float:
    """Mean |a - b| over mean |b|, of the whole tensors: finds a wrong head or batch entry."""
    return float((a.float() - b.float()).abs().mean() / b.float().abs().mean())


def _output_of(*command: str) -> str:
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()


def _commit() -> str:
    commit = _output_of("git", "rev-parse", "HEAD")
    if commit and _output_of("git", "status", "--porcelain"):
        commit += " with uncommitted changes"
    return commit or "unknown (no git here)"


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_machine(commit: str | None = None) -> dict[str, object]:
    """What a reader needs in order to repeat the figures."""
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    smi = _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        **dict(zip(query.split(","), smi.split(", "), strict=False)),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": _versions(["flash-attn", "cuda-bindings", "nvidia-cuda-nvrtc"]),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "commit": commit or _commit(),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
    }


def default_folder(kind: str) -> Path:
    """docs/performance/<date>-<gpu>-<kind>, for instance 2026-01-31-h100-80gb-hbm3-forward."""
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", ""))
    date = datetime.date.today().isoformat()
    return ROOT / "docs" / "performance" / f"{date}-{gpu.strip('-')}-{kind}"


def parse_dims(text: str) -> list[tuple[int, int]]:
    """`64,128x256` -> [(64, 64), (128, 256)]."""
    pairs = []
    for part in text.split(","):
        qk, _, v = part.partition("x")
        pairs.append((int(qk), int(v or qk)))
    return pairs


def flops_forward(row: Mapping[str, int | bool]) -> float:
    """2 B S^2 H (head_dim_qk + head_dim_v), halved when causal."""
    b, s, h = row["batch"], row["seqlen"], row["num_heads"]
    full = 2.0 * b * s * s * h * (row["head_dim_qk"] + row["head_dim_v"])
    return full / 2 if row["causal"] else full
