"""The two families of failure: problems of the user's input (`GuardError`, one line, exit code 1) and our own bugs.

A bug raises `AssertionError` (or another Python exception) and keeps its traceback. A `GuardError` has, in one line, the
file or option, what is wrong, and what to do next.
"""

from __future__ import annotations

from .reasons import reason_of


class GuardError(Exception):
    """Something about the request or its files; printed as one line."""


class ModelUnreadable(GuardError):
    """The file or folder is not a model that can be opened."""


class AnatomyNotFound(GuardError):
    """No residual stream was found, or not with certainty; the sentence holds the best partial match."""


class DirectionMismatch(GuardError):
    """A directions file is malformed or belongs to another model."""


class PromptsUnusable(GuardError):
    """An anchors or prompts file is missing, empty, unpaired or malformed."""


class GuardIncomplete(GuardError):
    """The guard did not go in exactly as planned; nothing was written."""


class GuardWeakens(GuardError):
    """With the guard fewer harmful prompts are refused than without it; nothing was written."""


class NoEffect(GuardError):
    """The guarded model equals the unguarded one on every harmful prompt that was run; nothing was written."""


class ProofFailed(GuardError):
    """A check of the proof failed; nothing was written."""


class RunFailed(GuardError):
    """A runtime opened the graph, but cannot run it on these inputs."""


class ManifestMismatch(GuardError):
    """A guarded folder differs from its manifest."""


class ExtraMissing(GuardError):
    """An optional dependency is not installed; the sentence names the extra."""


class OutputRefused(GuardError):
    """The output folder exists, or cannot be written."""


def first_line(error: BaseException) -> str:
    """The decisive part of a third-party error in one line, for embedding in one of our sentences (`reasons`)."""
    return reason_of(error)
