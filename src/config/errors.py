"""The error of every configuration that cannot work."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the key and the fix."""
