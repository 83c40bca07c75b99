"""The clock: real time, and the time that is written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from vlmguard.graphs.clock import now, stamp, to_text, wall_clock
from vlmguard.graphs.errors import GuardError

PINNED = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


def is_real(time: datetime) -> bool:
    return abs(time - datetime.now(UTC)) < timedelta(minutes=1)


def test_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert is_real(now()) and is_real(wall_clock()) and is_real(stamp().created)
    assert stamp().keeps_times and not stamp(reproducible=True).keeps_times
    assert to_text(stamp(reproducible=True).created) == "1970-01-01T00:00:00+00:00"


def test_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert now() == stamp().created == stamp(reproducible=True).created == PINNED
    assert is_real(wall_clock())
    assert stamp().keeps_times and not stamp(reproducible=True).keeps_times


@pytest.mark.parametrize("text", ["", "yesterday", "1.5", "9" * 30])
def test_what_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    for use in (now, stamp):
        with pytest.raises(GuardError) as raised:
            use()
        said = f"SOURCE_DATE_EPOCH is {text!r}, expected whole seconds since 1970; set it, or unset it"
        assert str(raised.value) == said
