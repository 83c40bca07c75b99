"""Keeps at most one decoder in memory: opening another one closes the one before it.

A decoder takes most of a machine's memory, and an export opens several in turn: the unguarded model, the same model with
taps, the guarded model. Code that opens them through `DecoderPlace` cannot hold two.
"""

from __future__ import annotations

from collections.abc import Callable

from .decoder import DecoderSession


class DecoderPlace:
    """Holds at most one open session."""

    def __init__(self) -> None:
        self._session: DecoderSession | None = None

    def open(self, make: Callable[[], DecoderSession]) -> DecoderSession:
        """A new session in place of the one before it, which is closed first."""
        self.close()
        self._session = make()
        return self._session

    def close(self) -> None:
        """Close the session, if one is open."""
        if self._session is not None:
            self._session.close()
            self._session = None
