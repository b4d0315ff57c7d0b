"""Endless text and sound, and saved states."""
