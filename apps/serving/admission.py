"""Places and a queue: how many answers run at once, how many requests may wait; no new ones once the server stops.

Lives in the event loop; nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import math
import time

from .http_errors import ApiError

_LONGEST_RETRY = 60


class Admission:
    """The door.

    Args:
        places: answers at the same time.
        queue: requests that may wait besides.

    Attributes:
        inside: requests that were let in, once their bodies had come, and have not left.
        running: those of them whose answer is being made.
        draining: no new requests are admitted.
        closed: who still waits for a place gets none.
    """

    def __init__(self, places: int, queue: int) -> None:
        self.places, self.queue = places, queue
        self.inside = self.running = 0
        self.draining = self.closed = False
        self._free = asyncio.Semaphore(places)  # first come, first served
        self._usual_seconds = 1.0

    @property
    def waiting(self) -> int:
        """Requests that are inside and not running: in the queue."""
        return self.inside - self.running

    @property
    def retry_after(self) -> int:
        """Seconds after which a place is likely to be free: what is inside, at the pace of the last answers."""
        expected = self._usual_seconds * max(self.inside, 1) / self.places
        return min(max(math.ceil(expected), 1), _LONGEST_RETRY)

    def enter(self) -> Visit:
        """Let a request in whose body has been read.

        Raises:
            ApiError: as `require_room`.
        """
        self.require_room()
        self.inside += 1
        return Visit(self)

    def require_room(self) -> None:
        """Raises ApiError: 503 while the server stops, 429 if places and queue are taken."""
        if self.draining:
            raise stopping()
        if self.inside >= self.places + self.queue:
            raise ApiError(
                429,
                f"{self.places} answers are being made and {self.queue} requests wait; try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=self.retry_after,
            )

    def close(self) -> None:
        """Stop admitting requests and reject queued ones."""
        self.draining = self.closed = True
        for _ in range(self.waiting):
            self._free.release()  # wakes one of them, who sees that the server has stopped


class Visit:
    """One request's way through: wait for a place, take it, leave."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._began: float | None = None
        self._left = False

    async def place(self) -> None:
        """Wait for a place.

        Raises:
            ApiError: the server stopped meanwhile.
        """
        await self._admission._free.acquire()
        self._began = time.monotonic()
        self._admission.running += 1
        if self._admission.closed:
            raise stopping()

    def leave(self) -> None:
        """Give the place back; a second time does nothing."""
        if self._left:
            return
        self._left = True
        self._admission.inside -= 1
        if self._began is not None:
            seconds = time.monotonic() - self._began
            self._admission._usual_seconds += 0.2 * (seconds - self._admission._usual_seconds)
            self._admission.running -= 1
            self._admission._free.release()


def stopping() -> ApiError:
    """The refusal of a server that is being stopped: another one may be up at once."""
    return ApiError(503, "the server is stopping; try again", code="stopping", retry_after=1)
