"""The whole API's engine that plays a script: see script.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence

from gptoss.engine.messages import AddRequest, TokenOutput
from gptoss.harmony.vocabulary_files import load_vocabulary
from tests.support.helpers import checkpoint
from tests.support.instant_engine import InstantEngine
from tests.support.script import Line, Script


class ScriptedEngine(InstantEngine):
    """The script as the engine of a whole API."""

    def __init__(self, lines: Iterable[Line] = (), max_model_len: int = 131_072) -> None:
        super().__init__([], max_model_len=max_model_len)
        self.vocabulary = load_vocabulary(checkpoint())
        self._script = Script(lines, self.vocabulary)
        self.lines, self.requests = self._script.lines, self._script.requests

    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]:
        return await self._script.add_requests(requests)
