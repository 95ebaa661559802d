"""What the model wrote and read in a web_search_call, which has the action alone.

The server remembers it by the item's id, for requests that continue the turn.
"""

from __future__ import annotations

import json
from typing import NamedTuple

SEARCH = "ws_"  # begins the id of a web_search_call


class RanSearch(NamedTuple):
    recipient: str  # browser.search
    text: str  # of the call
    result: str


def keep_search(ran: RanSearch) -> str:
    """The call as the text that is remembered."""
    return json.dumps(ran)


def read_search(kept: str) -> RanSearch:
    """The call of a text that `keep_search` made."""
    return RanSearch(*json.loads(kept))
