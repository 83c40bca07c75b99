"""Executors run one function over the batches of a job, in this process or on a cluster, with the same results in order.

A shard is one batch of the local run, never a part of one: rows of a batch are padded together, and another batch has other
padding and so other rounding. Open models cannot be pickled and are not sent; a `WorkerSpec` opens the same models in
another process, after a comparison of the files' digests (`cluster.py`).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..graphs.digests import sha256_files
from ..graphs.errors import ModelUnreadable

S = TypeVar("S")  # a shard
R = TypeVar("R")  # its results


class WorkerSpec(Protocol):
    """Opens a run's models in another process; plain data."""

    def files(self) -> Sequence[Path]:
        """Every file that decides what the results are, absolute."""
        ...

    def open(self) -> Callable[[Any], Any]:
        """Open the models and return the function that runs a shard."""
        ...


class Executor(Protocol):
    """`map`, here or elsewhere: the results of all shards, in their order.

    Args:
        work: what is done to a shard, with the models that are open here.
        shards: as they are needed; those of a cluster must be plain data.
    """

    def __call__(self, work: Callable[[S], R], shards: Iterable[S], /) -> Iterator[R]: ...


ExecutorFactory = Callable[[WorkerSpec], Executor]  # makes an executor for a spec of what its workers open


def in_turn(work: Callable[[S], R], shards: Iterable[S], /) -> Iterator[R]:
    """In this process, one after the other."""
    return map(work, shards)


def local_executors(worker_spec: WorkerSpec) -> Executor:
    """The executor of this process: it runs each shard with the models that are open here."""
    return in_turn


def when_needed(worker_spec: WorkerSpec) -> Callable[[Any], Any]:
    """The work of a spec, opened at the first shard: where other processes do them all, this one opens nothing."""
    opened = lru_cache(maxsize=1)(worker_spec.open)
    return lambda shard: opened()(shard)


@dataclass(frozen=True)
class PinnedSpec:
    """A worker spec, and the digests and versions that its files and libraries must have wherever it is opened.

    Attributes:
        digests: SHA-256 by path.
        versions: of what computes.
    """

    worker_spec: WorkerSpec
    digests: Mapping[Path, str]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, worker_spec: WorkerSpec) -> PinnedSpec:
        """As things are in this process."""
        return cls(worker_spec, sha256_files(worker_spec.files()), versions())

    def open(self) -> Callable[[Any], Any]:
        """The work of the spec, if its files and libraries are the same on this machine.

        Raises:
            ModelUnreadable: a file is missing or another one, or a library is.
        """
        where = f"worker on {platform.node()}"
        for name, found in versions().items():
            if found != self.versions[name]:
                raise ModelUnreadable(
                    f"{where}: has {name} {found}, the run began with {self.versions[name]}; install the same"
                )
        missing = next((path for path in self.digests if not path.is_file()), None)
        if missing is not None:
            raise ModelUnreadable(f"{where}: {missing} is not there; put the models at the same path on every machine")
        for path, digest in sha256_files(self.digests).items():
            if digest != self.digests[path]:
                raise ModelUnreadable(
                    f"{where}: {path} is another file (its SHA-256 begins {digest[:12]}, where the run began it begins "
                    f"{self.digests[path][:12]}); copy the model there again"
                )
        return self.worker_spec.open()


def versions() -> dict[str, str]:
    """Libraries and hardware that compute in this process: one row for each that affects rounding."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"machine": platform.machine()}
    for name in ("vlmguard", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
