"""The autotuner's search over one key: which candidates, in which order, and who wins.

    wave 1: the tiles that the tree's estimate ranks first, and the one in use
    wave 2: neighbours of the fastest of wave 1; wave 3: of the fastest by then
    final:  the fastest few and the one in use, more rounds; then the winner against the one in use

A wave is compiled, cleared of what spills, checked against the reference and timed. `Search` is one
key; `run` takes all keys through each step together, so that the compiler has all processors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from math import exp, inf, log
from typing import Any, TypeVar

from .._common.ask.problem import Problem, Target
from .._common.runtime import cubins
from .._common.runtime.spec import KernelSpec
from .._common.tiles.tuned_tiles import as_record
from .._common.tiles.tuning import Tile, Tunable
from .compile import Report, identity, together
from .journal import Journal
from .measure import Case, Checker, Clock, interleaved

T = TypeVar("T")
TIE = 0.01  # times closer than this are equal
FINALIST = 0.08  # how far behind the fastest a tile may be to be timed again
MAX_FINALISTS = 6
SCREEN_ROUNDS, FINAL_ROUNDS, DUEL_ROUNDS = 2, 5, 7
# Raise when a check or a time begins to mean something else: facts of before are then forgotten.
PROCEDURE = "3"

CompileAll = Callable[[Iterable[KernelSpec], str], Mapping[KernelSpec, Report]]
"""(specs, title of the progress bar) -> reports."""


class DeviceLostError(RuntimeError):
    """A candidate left the GPU's context unusable. It is noted: the next run leaves it out."""


@dataclass(frozen=True)
class Result:
    """shipped: the tiles in use, by seqlen; best None: nothing is better. shipped_us, best_us:
    microseconds by seqlen, from the same rounds.
    """

    key: str
    shipped: Mapping[int, Tile]
    best: Tile | None
    shipped_us: Mapping[int, float]
    best_us: Mapping[int, float]
    screened: Sequence[tuple[Tile, float]] = ()  # everything that was timed: (tile, mean us)
    rejected: Mapping[str, int] = field(default_factory=dict)  # reason -> candidates
    facts: Mapping[str, str] = field(default_factory=dict)  # where and when: gpu, driver, date

    @property
    def speedup(self) -> float:
        return mean(self.shipped_us) / mean(self.best_us)

    def as_fact(self) -> dict[str, Any]:
        """For the journal. `from_fact` is the inverse."""
        return {
            "key": self.key,
            "shipped": {seqlen: as_record(tile) for seqlen, tile in self.shipped.items()},
            "best": None if self.best is None else as_record(self.best),
            "shipped_us": self.shipped_us,
            "best_us": self.best_us,
            "screened": [[as_record(tile), us] for tile, us in self.screened],
            "rejected": self.rejected,
            "facts": self.facts,
        }

    @classmethod
    def from_fact(cls, kind: Callable[..., Tile], fact: Mapping[str, Any]) -> Result:
        """kind: the tile's dataclass."""
        return cls(
            fact["key"],
            {int(seqlen): kind(**tile) for seqlen, tile in fact["shipped"].items()},
            None if fact["best"] is None else kind(**fact["best"]),
            {int(seqlen): us for seqlen, us in fact["shipped_us"].items()},
            {int(seqlen): us for seqlen, us in fact["best_us"].items()},
            [(kind(**tile), us) for tile, us in fact["screened"]],
            fact["rejected"],
            fact["facts"],
        )


def mean(us: Mapping[int, float]) -> float:
    """Geometric, over seqlens."""
    return exp(sum(log(value) for value in us.values()) / len(us))


Times = Mapping[Tile, Mapping[int, float]]
"""Microseconds by seqlen."""


def in_use(times: Times, shipped: Mapping[int, Tile]) -> dict[int, float]:
    """The times of the tiles in use, each at its seqlen."""
    return {seqlen: times[tile][seqlen] for seqlen, tile in shipped.items()}


def choose(times: Times, shipped: Mapping[int, Tile]) -> Tile | None:
    """The fastest tile that is nowhere slower than the one in use there; None if what is in use is
    as fast. Of tiles that tie, the first by its fields: equal times give equal tables.
    """
    before = in_use(times, shipped)
    allowed = {
        tile: mean(us)
        for tile, us in times.items()
        if all(us[seqlen] <= before[seqlen] * (1 + TIE) for seqlen in us)
    }
    fastest = min(allowed.values(), default=mean(before))
    if mean(before) <= fastest * (1 + TIE):
        return None
    return min((tile for tile, us in allowed.items() if us <= fastest * (1 + TIE)), key=astuple)


@dataclass(frozen=True)
class Settings:
    """How thorough, and where facts about candidates belong."""

    problems: Mapping[int, Problem]  # to time, by seqlen
    check: Problem  # to compare with the reference: small, of ragged lengths
    max_candidates: int
    max_neighbours: int
    also_for: tuple[str, ...] = ()  # time tiles that fit these archs, too


class Search:
    """One key: its candidates and what is known of them."""

    def __init__(
        self,
        tunable: Tunable,
        target: Target,
        settings: Settings,
        journal: Journal,
        machine: str,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """machine: GPU, driver and all else that results depend on. facts: see Result."""
        self.facts = facts or {}
        self.tunable, self.target, self.settings, self.journal = tunable, target, settings, journal
        self.machine = f"{machine}, procedure {PROCEDURE}"
        self.problem = next(iter(settings.problems.values()))
        self.shipped = {
            seqlen: tunable.shipped(problem, target.arch, target.gpu)
            for seqlen, problem in settings.problems.items()
        }
        self.times: dict[Tile, dict[int, float]] = {}
        self.rejected: dict[str, int] = {}
        self.waved: list[Tile] = []
        self._checker: Checker | None = None

    def specs(self, tile: Tile) -> tuple[KernelSpec, ...]:
        return self.tunable.specs(self.problem, self.target.arch, tile)

    def identity(self) -> str:
        """Of the search: all that its result depends on."""
        s = self.settings
        problems = [f"{seqlen}: {problem!r}" for seqlen, problem in s.problems.items()]
        effort = f"{s.max_candidates} {s.max_neighbours} {s.also_for}"
        shipped = [identity(self.specs(tile)[0]) for tile in self.shipped.values()]
        parts = [self.machine, self.tunable.tree, self.tunable.direction, effort]
        return cubins.content_key([*parts, *problems, *shipped])

    def known(self) -> Result | None:
        """The result of an earlier run with the same sources, machine and settings."""
        fact = self.journal.get("result", self.identity())
        return None if fact is None else Result.from_fact(self.tunable.kind, fact)

    def first_wave(self) -> list[Tile]:
        found = self.tunable.candidates(
            self.problem, self.target.arch, self.settings.max_candidates
        )
        for arch in self.settings.also_for:
            share = max(2, self.settings.max_candidates // 4)
            found.append(self.tunable.builtin(self.problem, arch))
            found += self.tunable.candidates(self.problem, arch, share)
        fits = self.tunable.refuses
        found = [tile for tile in found if fits(tile, self.problem, self.target.arch) is None]
        return self._wave([*self.shipped.values(), *found])

    def next_wave(self) -> list[Tile]:
        """Neighbours of the fastest so far."""
        near = min(self.times, key=lambda tile: (mean(self.times[tile]), astuple(tile)))
        found = self.tunable.neighbours(near, self.problem, self.target.arch, 1 << 30)
        new = [tile for tile in found if tile not in self.waved]
        return self._wave(new[: self.settings.max_neighbours])

    def _wave(self, tiles: Sequence[Tile]) -> list[Tile]:
        new = [tile for tile in dict.fromkeys(tiles) if tile not in self.waved]
        self.waved += new
        return new

    def reject(self, reason: str) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def screen(
        self, tiles: Sequence[Tile], reports: Mapping[KernelSpec, Report], clock: Clock
    ) -> None:
        """Times those of the tiles that do not spill and compute the right thing. The tiles in use
        are what users have: they may spill, and must be right.
        """
        good = []
        for tile in tiles:
            report = together(reports[spec] for spec in self.specs(tile))
            shipped = tile in self.shipped.values()
            spills = report.spill_bytes > 0 and not shipped
            reason = report.error or ("spills" if spills else self._check(tile))
            if reason is None:
                good.append(tile)
            elif shipped:
                raise RuntimeError(f"the tile in use: {reason}")
            else:
                self.reject(reason if spills else "does not compile" if report.error else "wrong")
        if good:
            self.times.update(self._time(good, SCREEN_ROUNDS, clock))

    def result(self, clock: Clock) -> Result:
        """The verdict, from fresh rounds of the finalists."""
        order = sorted(self.times, key=lambda tile: (mean(self.times[tile]), astuple(tile)))
        near = mean(self.times[order[0]]) * (1 + FINALIST)
        finalists = [tile for tile in order if mean(self.times[tile]) <= near][:MAX_FINALISTS]
        shipped = list(self.shipped.values())
        times = self._time([*shipped, *finalists], FINAL_ROUNDS, clock)
        best = choose(times, self.shipped)
        if best is not None:  # the best of many may owe it to luck: once more, without the others
            times = self._time([*shipped, best], DUEL_ROUNDS, clock)
            best = choose(times, self.shipped)
        before = in_use(times, self.shipped)
        screened = [(tile, mean(self.times[tile])) for tile in order]
        result = Result(
            self.tunable.key(self.problem),
            self.shipped,
            best,
            before,
            before if best is None else times[best],
            screened,
            self.rejected,
            self.facts,
        )
        self.journal.put("result", self.identity(), result.as_fact())
        self._checker = None
        return result

    def _plan(self, problem: Problem, tile: Tile) -> Any:
        return self.tunable.plan(problem, self.target, tile)

    def _check(self, tile: Tile) -> str | None:
        """Why the results are wrong, or cannot be had; None if they are right. Asked once per
        candidate and machine: one that took the process with it is not tried again.
        """
        name = cubins.content_key(
            [identity(self.specs(tile)[0]), self.machine, repr(self.settings.check)]
        )
        known = self.journal.get("check", name)
        if known:
            return known["wrong"]  # type: ignore[no-any-return]
        if self._checker is None:
            self._checker = Checker(self.tunable, self.settings.check, self.target)
        self.journal.put("check", name, {"wrong": "ended an earlier run"})
        wrong: str | None = None
        try:
            wrong = self._checker.refuses(self._plan(self._checker.case.problem, tile))
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
            if not self._usable():
                raise DeviceLostError(
                    f"{self.tunable.key(self.problem)}: {tile}: {wrong}"
                ) from error
        except BaseException:  # the user's interrupt is not the candidate's fault
            self.journal.put("check", name, {})
            raise
        self.journal.put("check", name, {"wrong": wrong})
        return wrong

    def _usable(self) -> bool:
        if self.target.simulated:
            return True
        import torch

        try:
            torch.cuda.synchronize(self.target.device_index)
        except RuntimeError:
            return False
        return True

    def _time(
        self, tiles: Sequence[Tile], rounds: int, clock: Clock
    ) -> dict[Tile, dict[int, float]]:
        tiles = list(dict.fromkeys(tiles))
        times: dict[Tile, dict[int, float]] = {tile: {} for tile in tiles}
        for seqlen, problem in self.settings.problems.items():
            case = Case(self.tunable, problem, self.target)
            runs = {tile: case.run(self._plan(case.problem, tile)) for tile in tiles}
            for tile, samples in interleaved(runs, rounds, clock).items():
                times[tile][seqlen] = statistics.median(samples)
        return times


WAVES = (
    ("candidates", Search.first_wave),
    ("neighbours", Search.next_wave),
    ("more neighbours", Search.next_wave),
)


def run(
    searches: Sequence[Search],
    compile_all: CompileAll,
    clock: Clock,
    each: Callable[[str, int], Callable[[], None]],
    done: Callable[[int, Result], None],
    seconds: float = inf,
) -> dict[int, str]:
    """All searches; what went wrong with some, by index. One that fails does not stop the others.

    Args:
        each: (title, total) begins a progress bar; what it returns is called after each item.
        done: (index, result) is called as soon as a result is known.
        seconds: with more than half of them gone there is no further wave; with all of them gone no
            further final.
    """
    failures: dict[int, str] = {}
    begin = time.monotonic()

    def attempt(i: int, step: Callable[[], T]) -> T | None:
        if i in failures:
            return None
        try:
            return step()
        except DeviceLostError:
            raise
        except Exception as error:
            failures[i] = f"{searches[i].tunable.key(searches[i].problem)}: {error}"
            return None

    open_ones = []
    for i, search in enumerate(searches):
        known = search.known()
        if known is None:
            open_ones.append(i)
        else:
            done(i, known)
    for title, wave_of in WAVES:
        if wave_of is not Search.first_wave and time.monotonic() - begin > seconds / 2:
            break
        waves = {i: attempt(i, partial(wave_of, searches[i])) or [] for i in open_ones}
        specs = [spec for i in waves for tile in waves[i] for spec in searches[i].specs(tile)]
        reports = compile_all(specs, f"compile {title}")
        advance = each(f"time {title}", len(waves))
        for i, tiles in waves.items():
            attempt(i, partial(searches[i].screen, tiles, reports, clock))
            advance()
    advance = each("finals", len(open_ones))
    for i in open_ones:
        if time.monotonic() - begin > seconds:
            failures.setdefault(i, f"{searches[i].tunable.key(searches[i].problem)}: out of time")
        result = attempt(i, partial(searches[i].result, clock))
        if result is not None:
            done(i, result)
        advance()
    return failures
