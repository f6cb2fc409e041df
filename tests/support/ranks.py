"""Processes that form process groups, and run the functions that a test sends them.

Starting a process costs seconds, so one set serves a whole session: ranks 0 .. n - 1 of it form the
group that a test of n ranks uses. A hang ends the set, and the next test starts another.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60.0  # for one job: a hang, not a slow machine


class Ranks:
    """`count` processes with groups of 1, 2, ... count ranks, from the first run on."""

    def __init__(self, count: int, backend: str) -> None:
        self.count, self.backend = count, backend
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name, "store"))
        for rank in range(self.count):
            here, there = context.Pipe()
            arguments = (rank, self.count, self.backend, store, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(group, *arguments)` returns on each rank of a group of `world`.

        Raises AssertionError with the traceback of every rank where it raised.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes[:world]:
            pipe.send((world, function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes[:world]):
            if not pipe.poll(SECONDS):
                self.close()
                raise AssertionError(f"rank {rank} of {world} hangs in {function.__name__}")
            good, result = pipe.recv()
            results.append(result)
            if not good:
                failures.append(f"rank {rank} of {world}:\n{result}")
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.pipes, self.processes = [], []


def _serve(rank: int, count: int, backend: str, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=count)
    groups = {world: dist.new_group(list(range(world))) for world in range(1, count + 1)}
    while True:
        try:
            world, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(groups[world], *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
