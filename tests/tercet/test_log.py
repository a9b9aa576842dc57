"""Logging: a warning that others set off may repeat without filling the log, and no count is lost."""

from __future__ import annotations

import pytest

from tercet.log import RepeatedWarning, get_logger


def test_a_repeated_warning_is_logged_once_and_then_counted(caplog: pytest.LogCaptureFixture) -> None:
    warning = RepeatedWarning(get_logger("tercet.test"), interval_s=5.0)
    for i in range(1000):
        warning.warn(100.0 + i / 1000, "bad %s: 100%%", i)
    assert [r.getMessage() for r in caplog.records] == ["bad 0: 100%"]
    assert warning.pending
    warning.flush(104.9)
    assert len(caplog.records) == 1
    warning.flush(105.0)
    assert caplog.records[-1].getMessage() == "bad 999: 100% (the last of 999)"
    assert not warning.pending
    warning.flush(200.0)
    assert len(caplog.records) == 2
    warning.warn(201.0, "bad %s", "again")
    assert [r.getMessage() for r in caplog.records[2:]] == ["bad again"]
