"""POST /v1/completions (raw prompts, no Harmony), /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
