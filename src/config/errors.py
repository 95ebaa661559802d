"""The error for every invalid configuration."""

from __future__ import annotations


class ConfigError(ValueError):
    """An invalid configuration. The message names the key and the fix."""
