"""The o200k_harmony vocabulary, found without a network.

Order: the checkpoint's own tokenizer.json or GGUF file (byte-level BPE turned back into ranks), the ranks bundled with
the project, then openai-harmony's download. Whatever the source, the ranks must have the sha256 that openai-harmony
itself checks. A GGUF file with another vocabulary is refused: its tokens would mean something else.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import regex
from openai_harmony import HarmonyEncoding, HarmonyEncodingName, HarmonyError, load_harmony_encoding

from gptoss.cached_files import cached, default_cache_folder
from gptoss.harmony.bpe import UNLIMITED, BytePairs, Limits, TooManyTokensError
from gptoss.harmony.ranks import ranks_from_gguf, ranks_from_tokenizer_json, read_ranks
from gptoss.harmony.special_tokens import FIRST_SPECIAL, SPECIAL_TEXT, SPECIAL_TOKENS, SPLIT_PATTERN
from gptoss.resources import resource

logger = logging.getLogger(__name__)
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
RANKS_NAME = "o200k_base.tiktoken"
BUNDLED_RANKS = resource("assets", "vocabulary", f"{RANKS_NAME}.gz")


class VocabularyError(Exception):
    """No source has the right ranks. The message names the sources."""


LONG_PIECE = 1000  # characters
PORTION = 16_384  # characters; the library holds the interpreter lock while it encodes
SEARCHED = 1_000_000  # characters that are searched for a break between checks of the limits
_SPLIT = regex.compile(SPLIT_PATTERN)
# a piece is a run of one kind of character, so without such a run there is no long piece; shorter runs are skipped
_LONG_RUN = regex.compile(r"\S{1000}|\s{1000}|(?:\S++|\s++)(*SKIP)(*FAIL)")
# a position that always begins a piece: no alternative of the pattern contains these two characters in sequence
_BREAK = regex.compile(r"(?<=\S) |(?<=\p{L})[^\p{L}\p{M}']|(?<=\p{N})\P{N}")
_SPECIAL = regex.compile(r"<\|\w+\|>")


@dataclass(frozen=True)
class Vocabulary:
    """Converts text to token ids and back.

    `<|start|>` typed by a user is plain text, never a special token.
    """

    encoding: HarmonyEncoding
    ranks_path: Path
    source: str
    num_ordinary = FIRST_SPECIAL

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Bytes of each ordinary token, by id."""
        return list(read_ranks(self.ranks_path.read_bytes()))

    def encode(self, text: str, limits: Limits = UNLIMITED) -> list[int]:
        """Encodes a text; a long one in portions, between which other threads may run.

        Raises:
            TooManyTokensError, EncodingStoppedError: see Limits; text that is certainly too long is not encoded at all.
        """
        if len(text) <= PORTION:
            ids = self._encode_portion(text, limits, 0)
            limits.check(len(ids))
            return ids
        if len(text) > limits.max_tokens * self.byte_pairs.longest:
            raise TooManyTokensError
        ids, begin = [], 0
        while begin < len(text):
            end = self._end_of_portion(text, begin, limits)
            ids += self._encode_portion(text[begin:end], limits, len(ids))
            limits.check(len(ids))
            begin = end
        return ids

    @staticmethod
    def _end_of_portion(text: str, begin: int, limits: Limits) -> int:
        for start in range(begin + PORTION, len(text), SEARCHED):
            limits.check()
            found = _BREAK.search(text, start, start + SEARCHED)
            if found is not None:
                return int(found.start())
        return len(text)

    def _encode_portion(self, text: str, limits: Limits, num_before: int) -> list[int]:
        if _LONG_RUN.search(text) is not None:
            return self._encode_by_pieces(text, limits, num_before)
        ids: list[int] = self.encoding.encode(text, disallowed_special=())
        return ids

    def _encode_by_pieces(self, text: str, limits: Limits = UNLIMITED, num_before: int = 0) -> list[int]:
        """Encodes long pieces in windows, with the same result.

        The library merges a piece in quadratic time: a megabyte without a break would take minutes.
        """
        ids: list[int] = []
        for part, is_long in _parts(text):
            if is_long:
                ids += self.byte_pairs.encode(part.encode(), limits, num_before + len(ids))
            else:
                ids += self.encoding.encode(part, disallowed_special=())
            limits.check(num_before + len(ids))
        return ids

    @cached_property
    def byte_pairs(self) -> BytePairs:
        def encode_piece(text: str) -> list[int] | None:
            found = _SPLIT.match(text)
            if found is None or found.end() < len(text):
                return None
            ids: list[int] = self.encoding.encode(text, disallowed_special=())
            return ids

        longest = max(map(len, self.token_bytes))
        return BytePairs(self.token_bytes, self.rank_of, longest, encode_piece)

    @cached_property
    def rank_of(self) -> dict[bytes, int]:
        """Ids of ordinary tokens by their bytes."""
        return {token: rank for rank, token in enumerate(self.token_bytes)}

    def encode_with_special(self, text: str, limits: Limits = UNLIMITED) -> list[int]:
        """Encodes a raw prompt, in which `<|start|>` is the special token. Raises as `encode` does."""
        ids: list[int] = []
        done = 0
        for found in _SPECIAL.finditer(text):
            special = SPECIAL_TOKENS.get(found.group())
            if special is not None:
                before = text[done : found.start()]
                ids += [*self.encode(before, limits.less(len(ids))), special]
                done = found.end()
        return ids + self.encode(text[done:], limits.less(len(ids)))

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token: `<|name|>` for special tokens, empty for ids outside the vocabulary."""
        if 0 <= token_id < FIRST_SPECIAL:
            return self.token_bytes[token_id]
        return SPECIAL_TEXT.get(token_id, "").encode()

    def decode(self, token_ids: list[int]) -> str:
        """The text of any ids: special tokens as `<|name|>`, invalid UTF-8 as U+FFFD."""
        return b"".join(map(self.bytes_of, token_ids)).decode("utf-8", "replace")


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Splits a text into parts that can be encoded separately.

    Yields (part, whether it is one long piece).
    """
    begin = end = 0
    for match in _SPLIT.finditer(text):
        is_long = match.end() - match.start() >= LONG_PIECE
        if end > begin and (is_long or match.end() - begin > PORTION):
            yield text[begin:end], False
            begin = end
        end = match.end()
        if is_long:
            yield text[begin:end], True
            begin = end
    if end > begin:
        yield text[begin:end], False


def load_vocabulary(checkpoint: Path | None = None, cache_folder: Path | None = None) -> Vocabulary:
    """Loads the vocabulary from the first source that has it.

    Raises VocabularyError if no source has ranks with the right sha256, CacheError if they cannot be written.
    """
    cache = cache_folder or default_cache_folder()
    tried: list[str] = []
    ranks_path, source = _find_ranks(checkpoint, cache, tried)
    if ranks_path is not None:
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(ranks_path.parent)
    try:
        encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    except HarmonyError as error:
        raise VocabularyError(f"no vocabulary: {'; '.join(tried)}; openai-harmony's download: {error}") from error
    if ranks_path is None:
        ranks_path = _downloaded_ranks()
        if ranks_path is None:
            raise VocabularyError(f"no vocabulary: {'; '.join(tried)}; openai-harmony's download left no ranks file")
    logger.info("vocabulary from %s", source)
    return Vocabulary(encoding, ranks_path, source)


def _find_ranks(checkpoint: Path | None, cache: Path, tried: list[str]) -> tuple[Path | None, str]:
    target = cache / "vocabulary" / RANKS_NAME
    cached_is_right = _has_right_hash(target)
    is_gguf = checkpoint is not None and checkpoint.is_file()
    tokenizer = checkpoint if checkpoint is None or is_gguf else checkpoint / "tokenizer.json"
    if tokenizer is not None and tokenizer.is_file():
        if cached_is_right and _cached_source(target, tokenizer):
            return target, f"{tokenizer} (cached)"
        try:
            data = ranks_from_gguf(tokenizer) if is_gguf else ranks_from_tokenizer_json(tokenizer)
        except (ValueError, KeyError, OSError) as error:
            if is_gguf and not isinstance(error, KeyError):
                raise VocabularyError(f"{tokenizer}: its vocabulary is not o200k_harmony: {error}") from error
            tried.append(f"{tokenizer}: {error}")
        else:
            if hashlib.sha256(data).hexdigest() == RANKS_SHA256:
                _remember_source(target, tokenizer)
                return _kept(target, data), str(tokenizer)
            if is_gguf:
                raise VocabularyError(f"{tokenizer}: its vocabulary is not o200k_harmony: {_difference(data)}")
            tried.append(f"{tokenizer}: its ranks have another sha256")
    else:
        tried.append(f"{tokenizer or 'checkpoint'}: not there")
    if cached_is_right:
        return target, f"{BUNDLED_RANKS.name} bundled with the project (cached)"
    try:
        data = gzip.decompress(BUNDLED_RANKS.read_bytes())
    except OSError as error:
        tried.append(f"{BUNDLED_RANKS}: {error}")
        return None, "openai-harmony's download"
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        tried.append(f"{BUNDLED_RANKS}: wrong sha256")
        return None, "openai-harmony's download"
    return _kept(target, data), f"{BUNDLED_RANKS.name} bundled with the project"


def _difference(data: bytes) -> str:
    """What distinguishes ranks from the right ones."""
    found, right = data.splitlines(), gzip.decompress(BUNDLED_RANKS.read_bytes()).splitlines()
    pairs = zip(found, right, strict=False)
    number = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(found), len(right)))
    return f"it has {len(found)} ordinary tokens of {len(right)}, and token {number} is another"


def _has_right_hash(path: Path) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == RANKS_SHA256
    except OSError:
        return False


def _kept(target: Path, data: bytes) -> Path:
    """Returns the ranks file in the cache, or one for this process only if the cache is not writable."""

    def write(path: Path) -> None:
        path.write_bytes(data)

    return cached(target, write, RANKS_SHA256)


def _fingerprint(tokenizer: Path) -> bytes:
    stat = tokenizer.stat()
    return b"%s %d %d\n" % (os.fsencode(tokenizer.resolve()), stat.st_size, stat.st_mtime_ns)


def _known_sources(target: Path) -> list[bytes]:
    """Fingerprints of the tokenizer.json files with the cached ranks; empty if they cannot be read."""
    try:
        return target.with_suffix(".sources").read_bytes().splitlines(keepends=True)
    except OSError:
        return []


def _cached_source(target: Path, tokenizer: Path) -> bool:
    return _fingerprint(tokenizer) in _known_sources(target)


def _remember_source(target: Path, tokenizer: Path) -> None:
    """Records the file, which saves the next start a second; does nothing if the cache is not writable."""
    lines = [*_known_sources(target)[-63:], _fingerprint(tokenizer)]
    with contextlib.suppress(OSError):
        _write_atomically(target.with_suffix(".sources"), b"".join(lines))


def _downloaded_ranks() -> Path | None:
    for folder in (Path(tempfile.gettempdir()) / "tiktoken-rs-cache", default_cache_folder() / "vocabulary"):
        for path in folder.glob("*"):
            if path.is_file() and _has_right_hash(path):
                return path
    return None


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
        temporary.write(data)
    Path(temporary.name).replace(path)
