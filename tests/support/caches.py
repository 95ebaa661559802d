"""Where tests keep what they make once: small checkpoints and tokenizers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CHECKPOINTS = Path(os.environ.get("GPTOSS_TEST_CACHE", Path(tempfile.gettempdir()) / "gpt-oss-server-tests"))
