"""Endless text and sound, and saved states."""

from .prefix_store import PrefixStore


__all__ = ["PrefixStore"]
