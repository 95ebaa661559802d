"""What is kept of files and batches, on the disk and in answers."""

from __future__ import annotations

import re
import secrets
from typing import Any, Literal

import msgspec

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED: tuple[Status, ...] = ("failed", "completed", "expired", "cancelled")
FILE_ID = re.compile(r"file-[0-9a-f]{24}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(12)}"


class StoredFile(msgspec.Struct, kw_only=True):
    """A file, once it is whole. Times are seconds since 1970."""

    id: str
    owner: str
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    expires_at: int

    def shown(self) -> dict[str, Any]:
        """OpenAI's File."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        del shown["owner"]
        return {"object": "file", "status": "processed", "status_details": None, **shown}


class Problem(msgspec.Struct, kw_only=True):
    """Why a batch failed, as OpenAI's BatchError."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class RequestCounts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class StoredBatch(msgspec.Struct, kw_only=True):
    """A batch. Counts and usage are those of its end; while it runs, its job has them."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    completion_window: str = "24h"
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
    # of the files that are being written; they become output_file_id and error_file_id at the end
    spool_ids: tuple[str, str] = ("", "")
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    problems: list[Problem] = []
    usage: dict[str, Any] | None = None
    model: str | None = None
    ends_as: Status = "completed"  # what it becomes once its files are whole

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def ended_at(self) -> int | None:
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at

    def shown(self) -> dict[str, Any]:
        """OpenAI's Batch."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        for name in ("owner", "output_expires_after_s", "spool_ids", "ends_as"):
            del shown[name]
        problems = shown.pop("problems")
        errors = {"object": "list", "data": problems} if problems else None
        return {"object": "batch", "errors": errors, **shown}
