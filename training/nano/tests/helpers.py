"""What several tests of the lessons need."""

from __future__ import annotations

import re

from training.nano.values import value_text


def says(request: str, value: object) -> bool:
    """Whether a request has this value, however it writes numbers: 12,000 and 78.20."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", request)
    written = (request, plain, re.sub(r"(\.\d+?)0+(?!\d)", r"\1", plain))
    return any(value_text(value).lower() in text.lower() for text in written)
