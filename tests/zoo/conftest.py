"""Brings the fixtures of the zoo here."""

from zoo_fixtures import generation_folders, zoo

__all__ = ["generation_folders", "zoo"]
