"""Calls into the package `tokenizers`, whose files are untrusted: every failure of theirs becomes one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...graphs.errors import GuardError, ModelUnreadable, first_line


@contextmanager
def tokenizer_calls(where: Path, what: str = "its tokenizer fails") -> Iterator[None]:
    """For some files (a Precompiled normalizer without its table) the Rust code panics, at loading or at the first text that
    reaches the damage. pyo3 makes a `PanicException` of that, which is no `Exception`; other failures are bare `Exception`s.

    Raises:
        ModelUnreadable: the tokenizer failed.
    """
    try:
        yield
    except GuardError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelUnreadable(f"{where}: {what} ({first_line(error)}); copy it from the model again") from None
