"""When something was made, for a manifest: now, or a time that is always the same."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime

from ...graphs.errors import GuardError

_VARIABLE = "SOURCE_DATE_EPOCH"  # https://reproducible-builds.org/specs/source-date-epoch/


@dataclass(frozen=True)
class Stamp:
    """Attributes:
    created: the manifest's time.
    keeps_times: whether the manifest has the times at which big files were changed; without, they are hashed at each opening.
    """

    created: datetime
    keeps_times: bool = True

    @property
    def text(self) -> str:
        return self.created.isoformat(timespec="seconds")


def stamp(reproducible: bool = False) -> Stamp:
    """Now, or the time that `SOURCE_DATE_EPOCH` says; where the result must be reproducible and nothing says, 1970.

    Raises:
        GuardError: the variable holds no time.
    """
    said = os.environ.get(_VARIABLE)
    if said is None:
        return Stamp(datetime.fromtimestamp(0, UTC) if reproducible else datetime.now(UTC), not reproducible)
    try:
        return Stamp(datetime.fromtimestamp(int(said), UTC), not reproducible)
    except (ValueError, OverflowError, OSError):
        raise GuardError(f"{_VARIABLE} is {said!r}, expected whole seconds since 1970; set it, or unset it") from None
