"""Paths with special rules for keys, limits and connections."""

from __future__ import annotations

ALWAYS_OPEN = frozenset({"/health", "/ready"})
DEBUG = frozenset({"/v1/chat/completions/render", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
PAGE = ("/page/",)
