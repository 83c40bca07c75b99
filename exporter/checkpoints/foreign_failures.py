"""Failures inside torch and transformers as one line that names the piece, the checkpoint and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...graphs.errors import GuardError, ModelUnreadable, first_line
from ...graphs.reasons import out_of_memory

_OURS = str(Path(__file__).parents[2])
WHAT_TO_DO = "try other versions of torch and transformers, or --exporter genai for the text decoder alone"
_MEMORY = "the machine has too little free memory"


@contextmanager
def in_one_line(sentence: str) -> Iterator[None]:
    """Within, an exception that torch or transformers raises becomes a `ModelUnreadable`; one that we raise stays.

    Args:
        sentence: names the checkpoint and the piece; the exception's first line and what to do follow it.
    """
    try:
        yield
    except GuardError:
        raise
    except Exception as failure:  # whatever they raise for a config is a fact about this checkpoint
        if _raised_by_us(failure):
            raise
        what_to_do = _MEMORY if out_of_memory(failure) else WHAT_TO_DO
        raise ModelUnreadable(f"{sentence} ({first_line(failure)}); {what_to_do}") from failure


def _raised_by_us(failure: Exception) -> bool:
    """Whether the innermost frame of the failure is in this package: then it is a bug and keeps its traceback."""
    frames = traceback.extract_tb(failure.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_OURS) and "/tests/" not in frames[-1].filename
