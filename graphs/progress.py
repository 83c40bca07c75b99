"""How long work reports its progress: two types of callbacks, and the callback that does nothing."""

from __future__ import annotations

from collections.abc import Callable

# Called with `(stage, done, total)`: the stage's name and how much of it is done; `(stage, 0, 1)` starts one of unknown length.
ProgressCallback = Callable[[str, int, int], None]
# Called with `(done, total)` by a function that is a single stage; the caller knows the stage's name.
CountCallback = Callable[[int, int], None]


def ignore_progress(stage: str, done: int, total: int) -> None:
    """The default `ProgressCallback`."""
