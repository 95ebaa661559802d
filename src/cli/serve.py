"""gptoss serve [flags]: starts the server. The same as `python src/server.py`."""

from __future__ import annotations
