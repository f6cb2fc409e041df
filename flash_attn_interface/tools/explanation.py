"""What `explain` and `explain_with_kvcache` answer: five lines to print, all of it with
`verbose=True`, or `to_dict()` for JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.problem import Problem
from .._common.runtime.spec import KernelSpec
from ..call.selection import Decision, Device

_CONSTANTS = re.compile(r"(?<=\) for )(\w+): .*")  # behind a kernel's name, file and architecture
_KERNEL_LINES = 3  # of the plan of a call over a cache, in the short answer


@dataclass(frozen=True)
class Backward:
    """Who would serve the backward of the call, with which kernels."""

    problem: BackwardProblem | None  # None: no backend can have one
    decision: Decision | None
    plan: str  # in its own words
    error: str = ""  # why, if no backend serves it

    @property
    def backend(self) -> str | None:
        """Name of the backend chosen, None if all refuse."""
        return self.decision.backend.name if self.decision else None

    def to_dict(self) -> dict[str, Any]:
        """Part of `Explanation.to_dict`."""
        return {**_decision_record(self.decision, self.error), "plan": self.plan.splitlines()}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it. If no backend serves the call, decision is None, and error
    says why."""

    problem: Problem
    device: Device
    decision: Decision | None
    plan: str  # the plan in its own words
    error: str = ""
    spec: KernelSpec | None = None  # None: no kernel is launched
    grid: int = 0  # CTAs
    cache_folder: Path | None = None
    cache_state: str = ""
    backward: Backward | None = None  # None: no backend serves the forward
    verbose: bool = False  # what printing shows: five lines, or everything

    @property
    def backend(self) -> str | None:
        """Name of the backend chosen: "flash2", "hopper", "reference"; None if all refuse."""
        return self.decision.backend.name if self.decision else None

    @property
    def refused(self) -> dict[str, str]:
        """Backends that were asked before the chosen one, with their reasons."""
        return dict(self.decision.refused) if self.decision else {}

    @property
    def constants(self) -> dict[str, bool | int]:
        """Compile-time constants of the kernel."""
        return dict(self.spec.constants) if self.spec else {}

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of one CTA."""
        return int(self.spec["smem_bytes"]) if self.spec else 0

    def __str__(self) -> str:
        return _text(self._everything() if self.verbose else self._summary())

    def to_dict(self) -> dict[str, Any]:
        """All of it, in the types of JSON."""
        kernel = None
        if self.spec is not None:
            kernel = {
                "source": self.spec.source,
                "entry": self.spec.entry,
                "arch": self.spec.arch,
                "ctas": self.grid,
                "smem_bytes": self.smem_bytes,
                "constants": self.constants,
                "state": self.cache_state,
                "folder": None if self.cache_folder is None else str(self.cache_folder),
            }
        return {
            "problem": {**asdict(self.problem), "text": self.problem.describe()},
            **_decision_record(self.decision, self.error),
            "plan": self.plan.splitlines(),
            "kernel": kernel,
            "backward": None if self.backward is None else self.backward.to_dict(),
        }

    def _summary(self) -> Iterator[tuple[str, Sequence[str]]]:
        yield "problem", [self.problem.describe()]
        yield "backend", [_in_one_line(self.decision, self.error)]
        kernel, state = "none", "nothing to compile"
        if self.spec is not None:
            kernel = f"{self.spec.entry} in {self.spec.source}, {self.grid} CTAs"
            state = self.cache_state
            if self.cache_folder is not None:
                state = f"{state}: {self.cache_folder}"
        elif self.plan:
            kernel = f"none: {self.plan.splitlines()[0]}"
        yield "kernel", [kernel]
        yield "compiled", [state]
        backward = "none, as the forward"
        if self.backward is not None:
            backward = _in_one_line(self.backward.decision, self.backward.error)
        yield "backward", [backward]

    def _everything(self) -> Iterator[tuple[str, Sequence[str]]]:
        """The hops of docs/tour.md, and the way back."""
        yield "1 problem", self._problem_lines()
        yield "2 backend", self._backend_lines()
        yield "3 plan", self._plan_lines()
        yield "4 cubin", self._cubin_lines()
        yield "5 kernel", self._kernel_lines()
        yield "backward", self._backward_lines()

    def _problem_lines(self) -> list[str]:
        p = self.problem
        strides = f"q {p.q_strides}, k {p.k_strides}, v {p.v_strides}"
        return [
            p.describe(),
            f"softmax_scale {p.softmax_scale:.6g}; strides (batch, row, head): {strides}",
            f"q, k and v are read {p.vector_bytes} bytes at a time",
        ]

    def _backend_lines(self) -> list[str]:
        return _decision_lines(self.decision, self.error)

    def _plan_lines(self) -> list[str]:
        spec = self.spec.describe() if self.spec else ""  # hop 5 shows it as a table
        return [line for line in self.plan.splitlines() if line != spec] or ["-"]

    def _cubin_lines(self) -> list[str]:
        if self.spec is None:
            return ["-"]
        place = [str(self.cache_folder)] if self.cache_folder else []
        return [f"{self.spec.label()}: {self.cache_state}", *place]

    def _kernel_lines(self) -> list[str]:
        if self.spec is None:
            return ["-"]
        width = max(len(name) for name in self.constants)
        return [
            f"{self.spec.entry} in {self.spec.source}, {self.grid} CTAs, with the constants",
            *(f"  {name:<{width}} {value}" for name, value in self.spec.constants),
        ]

    def _backward_lines(self) -> list[str]:
        if self.backward is None:
            return ["-"]
        lines = _decision_lines(self.backward.decision, self.backward.error)
        return lines + self.backward.plan.splitlines()


@dataclass(frozen=True)
class CacheExplanation:
    """What `explain_with_kvcache` found; print it. error says why, if no backend serves it."""

    problem: Problem
    device: Device
    decision: Decision | None
    plan: str  # the kernels in their order, in the plan's own words
    error: str = ""
    verbose: bool = False  # what printing shows: at most five lines, or everything

    @property
    def backend(self) -> str | None:
        """Name of the backend chosen: "flash2", "reference"; None if all refuse."""
        return self.decision.backend.name if self.decision else None

    def __str__(self) -> str:
        plan = self.plan.splitlines() or ["-"]
        if self.verbose:
            decision = _decision_lines(self.decision, self.error)
            parts = [("1 problem", [self.problem.describe()]), ("2 backend", decision)]
            return _text(iter([*parts, ("3 plan", plan)]))
        kernels = [_CONSTANTS.sub(r"\1", line) for line in plan]
        if len(kernels) > _KERNEL_LINES:
            kernels = [*kernels[: _KERNEL_LINES - 1], "... (verbose=True shows all)"]
        decision = [_in_one_line(self.decision, self.error)]
        return _text(
            iter([("problem", [self.problem.describe()]), ("backend", decision), ("plan", kernels)])
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, in the types of JSON."""
        return {
            "problem": {**asdict(self.problem), "text": self.problem.describe()},
            **_decision_record(self.decision, self.error),
            "plan": self.plan.splitlines(),
        }


def _decision_lines(decision: Decision | None, error: str) -> list[str]:
    if decision is None:
        return [f"none: {error}"]
    where = f" for {decision.target.describe()}" if decision.target else ""
    lines = [f"{decision.backend.name}{where}: {decision.reason}"]
    return lines + [f"not {name}: {reason}" for name, reason in decision.refused]


def _in_one_line(decision: Decision | None, error: str) -> str:
    return " ".join("; ".join(_decision_lines(decision, error)).split())


def _decision_record(decision: Decision | None, error: str) -> dict[str, Any]:
    return {
        "backend": decision.backend.name if decision else None,
        "arch": decision.target.arch if decision and decision.target else None,
        "reason": decision.reason if decision else None,
        "refused": dict(decision.refused) if decision else {},
        "error": error or None,
    }


def _text(parts: Iterator[tuple[str, Sequence[str]]]) -> str:
    """Each part's title stands in front of its first line."""
    lines = []
    for title, texts in parts:
        for text in texts:
            lines.append(f"{title:<11}{text}".rstrip())
            title = ""
    return "\n".join(lines)
