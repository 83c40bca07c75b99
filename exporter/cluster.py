"""Runs shards on a Ray cluster: workers open the models themselves, and a lost worker's shard runs again on another.

Ray provides only long-lived worker processes (actors without restarts). One loop here (`_Run`) assigns the shards and
reassigns those of lost workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from typing import Any

from ..graphs.errors import ExtraMissing, GuardError, first_line
from ..graphs.extras import install_command
from .executors import Executor, ExecutorFactory, PinnedSpec, R, S, local_executors

_MOST_LOSSES = 3  # a shard that kills its workers, or machines on which none comes up, must end the run
_AHEAD = 4  # shards per worker that may be done before their turn: what a killed run loses of them


@contextlib.contextmanager
def cluster(address: str, workers: int | None = None) -> Iterator[ExecutorFactory]:
    """Within the block, makes executors on a Ray cluster.

    Args:
        address: of a running cluster (`auto`: the one that this machine belongs to), or `local`: one is started here, and
            stopped again. A process that is connected already stays with its cluster.
        workers: how many processes; default: one per GPU of the cluster, or one per machine where it has none.

    Raises:
        ExtraMissing: Ray is not installed.
        GuardError: no such cluster.
    """
    if find_spec("ray") is None:
        raise ExtraMissing(
            f"distributing a run over a cluster needs ray, which is not installed; run: {install_command('ray')}"
        )
    if workers is not None and workers < 1:
        raise GuardError(f"{workers} workers do nothing; choose 1 or more")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no data leaves the machine without the user's consent
    import ray

    connects = not ray.is_initialized()
    if connects:
        _connect(address)
    try:
        count, gpus = _size(workers)
        yield lambda worker_spec: _on_cluster(PinnedSpec.of(worker_spec), count, gpus)
    finally:
        if connects:
            ray.shutdown()


def _connect(address: str) -> None:
    import ray

    quiet: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **quiet)
    except Exception as error:  # Ray raises a class of its own for each way in which it is not answered
        raise GuardError(
            f"--ray {address}: no cluster can be used there ({first_line(error)}); start one with `ray start --head`, or "
            "give local"
        ) from None


def _size(wanted: int | None) -> tuple[int, bool]:
    """Number of workers, and whether each takes a GPU."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    return wanted or gpus or max(1, len(machines)), gpus > 0


def _on_cluster(pinned: PinnedSpec, workers: int, gpus: bool) -> Executor:
    def over(work: Callable[[S], R], shards: Iterable[S], /) -> Iterator[R]:
        """`work` stays here: each worker opens its own."""
        return _Run(pinned, workers, gpus).map(shards)

    return over


class Worker:
    """The worker in a process of the cluster."""

    def open(self, pinned: PinnedSpec) -> None:
        self._work = pinned.open()

    def run(self, shard: Any) -> Any:
        return self._work(shard)


@dataclass
class _Task:
    """A shard that is to be done.

    Attributes:
        losses: how many workers it has cost so far.
    """

    number: int
    shard: Any
    losses: int = 0


@dataclass
class _Run:
    """One pass over the shards.

    Attributes:
        busy: what is awaited: the worker, and its shard; without one it is opening the models.
        lost: shards whose worker was lost; they come before all others.
        done: results whose turn has not come.
        given: shards that workers have or had.
        unopened: workers lost in a row while they opened the models.
    """

    pinned: PinnedSpec
    workers: int
    gpus: bool
    idle: list[Any] = field(default_factory=list)
    busy: dict[Any, tuple[Any, _Task | None]] = field(default_factory=dict)
    lost: deque[_Task] = field(default_factory=deque)
    done: dict[int, Any] = field(default_factory=dict)
    given: int = 0
    unopened: int = 0

    def map(self, shards: Iterable[Any]) -> Iterator[Any]:
        """The results, in the order of the shards."""
        import ray

        tasks = (_Task(number, shard) for number, shard in enumerate(shards))
        first = next(tasks, None)
        if first is None:
            return  # no worker is started for no work
        tasks, turn = chain([first], tasks), 0
        try:
            for _ in range(self.workers):
                self._start()
            while True:
                while turn in self.done:
                    yield self.done.pop(turn)
                    turn += 1
                while self.idle and (task := self._next(tasks, turn)) is not None:
                    worker = self.idle.pop()
                    self.busy[worker.run.remote(task.shard)] = worker, task
                if self.idle and turn == self.given:
                    return
                self._take(ray.wait(list(self.busy), num_returns=1)[0][0])
        finally:
            for worker in [*self.idle, *(worker for worker, _ in self.busy.values())]:
                ray.kill(worker)

    def _next(self, tasks: Iterator[_Task], turn: int) -> _Task | None:
        if self.lost:
            return self.lost.popleft()
        if self.given >= turn + _AHEAD * self.workers:
            return None
        task = next(tasks, None)
        self.given += task is not None
        return task

    def _start(self) -> None:
        import ray

        # SPREAD: over the machines, not all on the first one. No restarts: a free worker repeats a lost shard.
        actor: Any = ray.remote(num_cpus=1, num_gpus=int(self.gpus), scheduling_strategy="SPREAD")(Worker)
        worker = actor.remote()
        self.busy[worker.open.remote(self.pinned)] = worker, None

    def _take(self, answer: Any) -> None:
        """An answer has come, or will not come any more."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        worker, task = self.busy.pop(answer)
        try:
            result = ray.get(answer)
        except RayTaskError as error:
            # the work itself failed, and would again: a refusal in one line, or a bug's traceback
            self.idle.append(worker)
            if isinstance(error.cause, GuardError):
                raise error.cause from None
            raise
        except RayError as error:  # the worker, its machine or its answer is lost
            ray.kill(worker)
            self._lose(task, error)
            self._start()
            return
        self.idle.append(worker)
        if task is None:
            self.unopened = 0
        else:
            self.done[task.number] = result

    def _lose(self, task: _Task | None, error: Exception) -> None:
        if task is None:
            self.unopened += 1
        else:
            task.losses += 1
            self.lost.append(task)
        if max(self.unopened, task.losses if task is not None else 0) >= _MOST_LOSSES:
            what = "opened the models" if task is None else f"did batch {task.number + 1}"
            raise GuardError(
                f"{_MOST_LOSSES} workers were lost while they {what} ({first_line(error)}); is there enough memory on the "
                "machines of the cluster? choose fewer workers, or smaller batches"
            )


def open_executors(address: str | None, workers: int | None = None) -> AbstractContextManager[ExecutorFactory]:
    """Here, or over the Ray cluster at an address; arguments and errors as for `cluster`."""
    if address is None:
        if workers is not None:
            raise GuardError(f"{workers} workers need a cluster; name it with --ray")
        return nullcontext(local_executors)
    return cluster(address, workers)
