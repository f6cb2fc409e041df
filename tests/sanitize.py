"""compute-sanitizer over the kernels of both trees, on the current GPU.

    python tests/sanitize.py                                      all tools, all groups of calls
    python tests/sanitize.py memcheck racecheck --cases decode,append
    python tests/sanitize.py --list                               the groups and their calls
    python tests/sanitize.py --only-run [--cases hopper]          the calls, unchecked
    python tests/sanitize.py --simulate sm_80 --cases combine     likewise in the simulator: no GPU

Not collected by pytest: it needs a GPU and compute-sanitizer, of a CUDA toolkit. The calls are in
sanitize_cases.py. They run once unchecked, which compiles their kernels; then each tool and group
is a process of its own, several at a time, and one line says `clean` or is followed by the report.
What else a tool has to find, so that `clean` means something: mistakes planted in a kernel that is
loaded and launched as the others are. Exit status 0: all clean, all kernels launched, and the
planted mistakes found.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
# By processes that share a group's calls under a tool.
GROUPS = {
    "forward": 2, "backward": 4, "decode": 2, "append": 1, "combine": 1, "merge": 1, "hopper": 2,
    "hopper_backward": 4,
}  # fmt: skip
PLANTED = "mistakes"  # the group of mistakes that a tool must find
ROOT = Path(__file__).resolve().parent.parent
FORCE_BACKEND = "FLASH_ATTN_INTERFACE_FORCE_BACKEND"
REPORT_LINES = 120

# The names are those of extern "C" entries, which are not mangled; the key `regex` is searched for
# anywhere in them. A filter that the tool does not understand is ignored: everything is checked.
KERNEL_FILTER = "regex=flash2_|hopper_|probe_planted"


@dataclass(frozen=True)
class Limit:
    """What a tool says of code that is right. Counted and printed, but no failure."""

    tool: str
    finding: str  # its first line
    kernels: str  # that all of its lines name
    why: str


_RACE = r"Error: Race reported between (Read|Write) access"

# Each was seen on a correct kernel of a few lines with the same construction (compute-sanitizer
# 2025.3, H100). Under a limit racecheck says little: the simulator's race checker, which knows
# these constructions, runs on every simulated test of the same source.
LIMITS = (
    Limit(
        "synccheck",
        r"Barrier error detected\. Divergent thread\(s\) in block",
        r"flash2_bwd",
        "its two roles of warps meet at a barrier in two places of the code, as PTX allows",
    ),
    Limit(
        "racecheck",
        _RACE,
        r"flash2_bwd|flash2_decode",
        "warps meet at a barrier of all after unequal numbers of barriers among some of them",
    ),
    Limit(
        "racecheck",
        _RACE,
        r"hopper_fwd",
        "a warp writes, warp_sync(), then one lane's arrival at an mbarrier releases it",
    ),
)

_RAN = re.compile(r"^all (\d+) calls ran; kernels: (.*)$", re.MULTILINE)
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")


@dataclass(frozen=True)
class Outcome:
    """Of one process. status: its exit status, None where it ran out of time."""

    status: int | None
    text: str
    seconds: float

    @property
    def calls(self) -> int | None:
        """Their number, once all have run."""
        match = _RAN.search(self.text)
        return int(match[1]) if match else None

    @property
    def findings(self) -> int | None:
        """Of the sanitizer's summary; None without one."""
        counts = [int(count) for count in _SUMMARY.findall(self.text)]
        return sum(counts) if counts else None

    @property
    def complete(self) -> bool:
        return self.status == 0 and self.calls is not None

    def launches(self) -> Counter[str]:
        """Kernels by the number of their launches."""
        match = _RAN.search(self.text)
        parts = (part.split(" x ") for part in match[2].split(", ")) if match else ()
        return Counter({entry: int(count) for entry, count in parts})


def described(outcomes: Sequence[Outcome]) -> str:
    """What processes did, in one line."""
    launches = sum((outcome.launches() for outcome in outcomes), Counter[str]())
    kernels = ", ".join(f"{entry} x {count}" for entry, count in sorted(launches.items()))
    calls = sum(outcome.calls or 0 for outcome in outcomes)
    return f"{calls} calls: {kernels}, {max(outcome.seconds for outcome in outcomes):.0f} s"


def verdict(outcome: Outcome) -> str:
    """`clean`, or what is wrong. A tool that ends without a summary checked nothing."""
    if outcome.status is None:
        return "OUT OF TIME"
    if outcome.findings is None:
        return f"NO SUMMARY (exit status {outcome.status})"
    if outcome.findings:
        return f"{outcome.findings} FINDINGS"
    if outcome.status != 0 or outcome.calls is None:
        return f"THE CALLS FAILED (exit status {outcome.status})"
    return "clean"


def known_limit(tool: str, outcome: Outcome) -> Limit | None:
    """The one that all printed findings of a process come from, whose calls all ran."""
    if outcome.calls is None or not outcome.findings:
        return None
    findings = re.split(r"^=+ (?=Error|Barrier error|Invalid|Program hit|Warning: Race)",
                        outcome.text, flags=re.MULTILINE)[1:]  # fmt: skip
    for limit in LIMITS:
        if limit.tool == tool and findings and all(
            re.match(limit.finding, finding)
            and re.findall(r"\bat (\w+)\+0x", finding)
            and all(re.fullmatch(limit.kernels, k) for k in re.findall(r"\bat (\w+)\+0x", finding))
            for finding in findings
        ):  # fmt: skip
            return limit
    return None


def planted_verdict(outcome: Outcome) -> str:
    """Of the planted mistakes: here `clean` would be the failure."""
    found = bool(outcome.findings) and "probe_planted" in outcome.text
    return "found" if found else f"NOT FOUND ({verdict(outcome)})"


def sanitizer_command(sanitizer: str, tool: str, group: str, part: str = "0/1") -> list[str]:
    command = [sanitizer, "--tool", tool, "--kernel-name", KERNEL_FILTER, "--error-exitcode", "1"]
    command += ["--show-backtrace", "no"]  # of the host: which call it was is printed before
    if tool == "memcheck":  # the bindings look for symbols that this driver need not have
        command += ["--report-api-errors", "no"]
    return [*command, *calls_command(group), "--part", part, tool]


def calls_command(group: str) -> list[str]:
    return [sys.executable, str(Path(__file__)), "--run", group]


def execute(command: Sequence[str], limit_s: float) -> Outcome:
    # Without torch's caching allocator each tensor is an allocation whose ends memcheck knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    status: int | None = None
    try:
        output, _ = process.communicate(timeout=limit_s)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the sanitizer and the program under it
        output, _ = process.communicate()
    return Outcome(status, output.decode(errors="replace"), time.perf_counter() - started)


def run_group(
    name: str, tool: str = "", simulate: str = "", threads: int = 1, part: str = "0/1"
) -> None:
    """The calls of one group, in this process.

    tool: whose mistakes, if they are the group. part: "i/n" takes each n-th call from i on.
    """
    import torch

    os.environ[FORCE_BACKEND] = _tree(name)
    import sanitize_cases

    launches = _count_launches()
    device = torch.device("cpu" if simulate else "cuda")
    if name == PLANTED:
        cases: sanitize_cases.Cases = [
            (tool, lambda where: sanitize_cases.mistake(sanitize_cases.MISTAKES[tool], where))
        ]
    else:
        first, step = map(int, part.split("/"))
        cases = sanitize_cases.GROUPS[name].cases[first::step]

    def call(case: tuple[str, sanitize_cases.Run]) -> None:
        label, run = case
        print(f"call: {label}", flush=True)
        try:
            run(device)
            if not simulate:
                torch.cuda.synchronize()
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise SystemExit(f"{name}, {label}: {what}") from error

    if simulate:
        import flash_attn_interface

        with flash_attn_interface.simulate(simulate):
            for case in cases:
                call(case)
    else:
        torch.zeros(1, device=device)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(call, cases))
    kernels = ", ".join(f"{entry} x {count}" for entry, count in sorted(launches.items()))
    print(f"all {len(cases)} calls ran; kernels: {kernels}", flush=True)


def _tree(group: str) -> str:
    return "hopper" if group.startswith("hopper") else "flash2"


def _count_launches() -> Counter[str]:
    """Entries by the number of their launches from now on."""
    from flash_attn_interface._common.launch.driver import DeviceKernel
    from flash_attn_interface._common.sim.launcher import SimKernel

    counts: Counter[str] = Counter()
    for kernel_class in (DeviceKernel, SimKernel):

        def launch(self, *arguments, original=kernel_class.launch):
            counts[self.spec.entry] += 1
            return original(self, *arguments)

        kernel_class.launch = launch  # type: ignore[method-assign]
    return counts


def known_entries() -> Iterator[str]:
    """Kernels of the checkout's two trees."""
    for tree in ("flash2", "hopper"):
        for path in sorted((ROOT / tree).glob("*.cu")):
            found = re.search(
                r"^(?:CLUSTER_)?KERNEL\([^)]*\)\s+(\w+)\(", path.read_text("utf-8"), re.MULTILINE
            )
            if found:
                yield found[1]


def groups_here(names: Sequence[str]) -> list[str]:
    """Without those whose tree or GPU is missing; says so."""
    import torch

    reason = ""
    try:
        import flash_attn_3  # noqa: F401
    except ImportError as error:
        reason = f"the Hopper tree is not installed ({error})"
    else:
        if torch.cuda.get_device_capability() != (9, 0):
            reason = f"this is a {torch.cuda.get_device_name()}"
    kept = [name for name in names if not reason or _tree(name) != "hopper"]
    for name in names:
        if name not in kept:
            print(f"{name}: left out, {reason}")
    return kept


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", metavar="tool", help=f"default: {' '.join(TOOLS)}")
    parser.add_argument("--cases", default=",".join(GROUPS), help="groups; default %(default)s")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=180.0, help="limit for each process")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only-run", action="store_true")
    parser.add_argument("--simulate", default="", metavar="ARCH")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.tools = options.tools or list(TOOLS)
    options.groups = [group for group in GROUPS if group in options.cases.split(",")]
    for kind, given, known in (
        ("tool", options.tools, TOOLS),
        ("group", options.cases.split(","), GROUPS),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {kind} {sorted(unknown)}; known: {', '.join(known)}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    if options.run:
        run_group(options.run, options.tools[0], threads=options.threads, part=options.part)
        return 0
    if options.list:
        import sanitize_cases

        for name in options.groups:
            print(
                f"{name}:", *(label for label, _ in sanitize_cases.GROUPS[name].cases), sep="\n  "
            )
        return 0
    if options.simulate:
        for name in options.groups:
            run_group(name, simulate=options.simulate)
        return 0
    groups = groups_here(options.groups)
    outcomes = run_unchecked(groups, options.jobs, options.seconds)
    ran = [group for group, outcome in outcomes.items() if outcome.complete]
    failed = ran != groups
    if set(ran) == set(GROUPS):
        missing = never_launched(outcomes.values())
        failed |= bool(missing)
        print(f"NEVER LAUNCHED: {missing}" if missing else "every kernel was launched")
    if options.only_run:
        return int(failed)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH", file=sys.stderr)
        return 2
    good = check(sanitizer, options.tools, ran, options.jobs, options.seconds)
    return int(failed or not good)


def run_unchecked(groups: Sequence[str], jobs: int, limit_s: float) -> dict[str, Outcome]:
    """The calls without a tool, by threads: this compiles their kernels."""
    with ThreadPoolExecutor(jobs) as pool:
        commands = [[*calls_command(group), "--threads", "8"] for group in groups]
        outcomes = list(pool.map(lambda command: execute(command, limit_s), commands))
    for group, outcome in zip(groups, outcomes, strict=True):
        print(
            f"unchecked  {group:<9} {'' if outcome.complete else 'FAILED, '}{described([outcome])}"
        )
        if not outcome.complete:
            print(_tail(outcome.text))
    return dict(zip(groups, outcomes, strict=True))


def never_launched(outcomes: Iterable[Outcome]) -> list[str]:
    return sorted(set(known_entries()).difference(*(outcome.launches() for outcome in outcomes)))


def check(
    sanitizer: str, tools: Sequence[str], groups: Sequence[str], jobs: int, limit_s: float
) -> bool:
    """Whether all is as it should be. Prints a line for each tool and group, and reports."""
    parts = {group: GROUPS[group] for group in groups} | {PLANTED: 1}
    good = True
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            (tool, group): [
                pool.submit(execute, sanitizer_command(sanitizer, tool, group, f"{i}/{n}"), limit_s)
                for i in range(n)
            ]
            for tool in tools
            for group, n in parts.items()
        }
        for (tool, group), futures in running.items():
            outcomes = [future.result() for future in futures]
            verdicts: dict[str, None] = {}  # in order, each once
            reports: dict[str, Outcome] = {}
            for outcome in outcomes:
                judged = planted_verdict(outcome) if group == PLANTED else verdict(outcome)
                limit = known_limit(tool, outcome)
                if limit is not None and group != PLANTED:
                    judged = f"{outcome.findings} findings of a known kind: {limit.why}"
                elif judged not in ("clean", "found"):
                    good = False
                    reports[judged] = outcome
                verdicts[judged] = None
            if len(verdicts) > 1:
                verdicts.pop("clean", None)
            print(
                f"{tool:<10} {group:<9} {', '.join(verdicts)} ({described(outcomes)})", flush=True
            )
            for outcome in reports.values():
                print(_report(outcome.text), flush=True)
    return good


def _report(text: str) -> str:
    """The sanitizer's lines, each under the call that it is about; or the end of the output."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("call: "):
            if lines and lines[-1].startswith("call: "):
                lines.pop()
            lines.append(line)
        elif line.startswith("=========") and line.strip("= "):
            lines.append(line)
    if sum(line.startswith("=") for line in lines) <= 3:
        return _tail(text)
    half = REPORT_LINES // 2
    if len(lines) > REPORT_LINES:
        lines[half:-half] = [f"... {len(lines) - REPORT_LINES} lines left out ..."]
    return "\n".join(lines)


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-30:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
