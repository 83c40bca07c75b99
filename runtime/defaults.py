"""Defaults that the Python API and every command share; imports nothing."""

from __future__ import annotations

MAX_NEW_TOKENS = 100  # longest answer in tokens: refusals can come late
