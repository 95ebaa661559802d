"""Who may send requests, and how many: keys, limits for each, and the state of draining."""

from __future__ import annotations
