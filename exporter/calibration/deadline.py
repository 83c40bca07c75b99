"""The time that a calibration may take (`--calibration-seconds`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Deadline:
    """Called: whether the time is over.

    Attributes:
        seconds: allowed; `None` for no limit.
        started: monotonic time of its beginning.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.started > self.seconds
