"""The clock: the time that is written into manifests, bills of materials, reports and benchmark records, and the real one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime

from .errors import GuardError

_VARIABLE = "SOURCE_DATE_EPOCH"  # https://reproducible-builds.org/specs/source-date-epoch/


@dataclass(frozen=True)
class Stamp:
    """When a guarded folder was made.

    Attributes:
        created: the time for its manifest, UTC.
        keeps_times: whether the manifest records when big files were changed; without, they are hashed at each opening.
    """

    created: datetime
    keeps_times: bool = True


def stamp(reproducible: bool = False) -> Stamp:
    """The time of a guarded folder, decided once for all of its files.

    Args:
        reproducible: the same input must give the same bytes: no times of change, and 1970 unless `SOURCE_DATE_EPOCH` is set.

    Raises:
        GuardError: `SOURCE_DATE_EPOCH` is no time.
    """
    pinned = _pinned()
    if pinned is None and reproducible:
        pinned = datetime.fromtimestamp(0, UTC)
    return Stamp(pinned or wall_clock(), not reproducible)


def now() -> datetime:
    """The time for a file that is written now, UTC: that of `SOURCE_DATE_EPOCH` where it is set.

    Raises:
        GuardError: `SOURCE_DATE_EPOCH` is no time.
    """
    return _pinned() or wall_clock()


def wall_clock() -> datetime:
    """The real time, UTC: for what is answered and not kept (chat templates, HTTP replies) and for the age of files."""
    return datetime.now(UTC)


def to_text(time: datetime) -> str:
    """As a manifest contains it, in seconds: `2026-01-31T23:59:59+00:00`."""
    return time.isoformat(timespec="seconds")


def _pinned() -> datetime | None:
    given = os.environ.get(_VARIABLE)
    if given is None:
        return None
    try:
        return datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError):
        raise GuardError(f"{_VARIABLE} is {given!r}, expected whole seconds since 1970; set it, or unset it") from None
