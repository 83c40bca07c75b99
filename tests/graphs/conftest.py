"""Brings the `zoo` fixture here."""

from zoo_fixtures import zoo

__all__ = ["zoo"]
