"""Worker specs that workers of a test's Ray cluster open: they import this file, so that nothing of a test travels as code."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmguard.exporter.evaluation.batch_runner import AskBoth, Made, Shard
from vlmguard.graphs.errors import PromptsUnusable


@dataclass(frozen=True)
class Numbers:
    """A shard is a number; comes back with the process that had it. What else happens, the number says."""

    file: Path

    def files(self) -> list[Path]:
        return [self.file]

    def open(self) -> Callable[[int], tuple[int, int]]:
        def work(number: int) -> tuple[int, int]:
            if number == 100:
                raise PromptsUnusable("100 is too much; choose less")
            if number == 101:
                raise ZeroDivisionError("a bug")
            if number == 102:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.3 if number % 3 == 0 else 0.0)  # results come back in another order
            return number, os.getpid()

        return work


@dataclass(frozen=True)
class Mortal(AskBoth):
    """Waits to be killed in the middle of one batch, once.

    Attributes:
        folder: where the process writes its number when it is there.
    """

    folder: Path = Path()

    def open(self) -> Callable[[Shard], Made]:  # type: ignore[override]
        asking = super().open()

        def work(shard: Shard) -> Made:
            pid = self.folder / "pid"
            if shard.numbers[0] >= 8 and not pid.exists():
                asking.base.prefill(shard.requests)  # in the middle
                (self.folder / "pid.new").write_text(str(os.getpid()))
                (self.folder / "pid.new").rename(pid)
                time.sleep(600)
            return asking(shard)

        return work
