"""Detects repeated runs of tokens."""

from __future__ import annotations

from gptoss.engine.sampling_params import LoopGuard


class LoopWatch:
    """Watches the tokens of one request for a short run that repeats."""

    def __init__(self, guard: LoopGuard) -> None:
        self._guard = guard
        self.break_ids = guard.break_token_ids
        self.looping = False
        self._tokens: list[int] = []

    def copy(self) -> LoopWatch:
        other = LoopWatch(self._guard)
        other.looping, other._tokens = self.looping, self._tokens.copy()
        return other

    def push(self, token_id: int) -> None:
        tokens, max_span = self._tokens, self._guard.repeats * self._guard.max_period
        if self.looping and token_id in self.break_ids:
            tokens.clear()
        else:
            tokens.append(token_id)
        if len(tokens) > 2 * max_span:
            del tokens[:max_span]
        self.looping = self._sees_loop()

    def _sees_loop(self) -> bool:
        tokens, repeats = self._tokens, self._guard.repeats
        longest = min(self._guard.max_period, len(tokens) // repeats)
        if not longest or tokens[-1] not in tokens[-1 - longest : -1]:
            return False
        for period in range(1, longest + 1):
            span = period * repeats
            # equal to itself shifted by one period
            if tokens[-1] == tokens[-1 - period] and tokens[-span:-period] == tokens[-span + period :]:
                return True
        return False
