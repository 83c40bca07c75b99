"""onnxscript's optimizer takes an addition of 1e-8 for one of 0 and drops it: an epsilon, without which zeros become NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock


@contextmanager
def small_constants_kept() -> Iterator[None]:
    """Within, a constant matches the number of a rewrite rule only up to a share of it: no constant but 0 is 0.

    Without effect where onnxscript compares in another place; an epsilon that is lost then shows in the comparison with torch.
    """
    try:
        from onnxscript.rewriter import _matcher
    except ImportError:
        yield
        return

    def is_close(number: float, other: float, *, rel_tol: float = 1e-9, abs_tol: float = 0.0) -> bool:
        return math.isclose(number, other, rel_tol=rel_tol)

    with mock.patch.object(_matcher, "math", SimpleNamespace(**{**vars(math), "isclose": is_close}), create=True):
        yield
