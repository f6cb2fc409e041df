"""What the autotuner has found out so far, one JSON line each: an interrupted run goes on from it.

Facts are filed under a kind and an id, a hash of all that they depend on (sources, constants,
compiler; for what ran, also GPU, driver and workload), so nothing in the file is ever stale: what
no longer matches is not asked for.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from .._common.runtime import trust


class Journal:
    """path None: remembers for this process only."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._facts: dict[tuple[str, str], dict[str, Any]] = {}
        self._guard = threading.Lock()
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    self._facts.pop((record["kind"], record["id"]), None)  # newest last
                    self._facts[record["kind"], record["id"]] = record["fact"]
                except (ValueError, KeyError, TypeError):
                    continue  # the last line of a killed run

    def get(self, kind: str, identity: str) -> dict[str, Any] | None:
        return self._facts.get((kind, identity))

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Facts of a kind, oldest first."""
        return [fact for (of_kind, _), fact in self._facts.items() if of_kind == kind]

    def put(self, kind: str, identity: str, fact: dict[str, Any]) -> None:
        """Remembers, and has written when it returns. Called from any thread."""
        line = json.dumps({"kind": kind, "id": identity, "fact": fact})
        with self._guard:
            self._facts[kind, identity] = fact
            if self.path is not None:
                if not self.path.parent.is_dir():
                    trust.make_private(self.path.parent)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
