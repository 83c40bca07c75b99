"""Records of an evaluation, one per prompt, and the file of JSON lines from which a killed run resumes.

The first line identifies models and settings; every other line is one prompt. A batch's lines are written together and
flushed to disk, so a killed run loses at most one batch. An incomplete last line is dropped. Answers are kept only on
request, so that an unguarded model's answers to harmful prompts are not left on disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...graphs.errors import OutputRefused
from ...graphs.strict_json import from_strict_json, to_strict_json

SCHEMA = "vlmguard.evaluation-records/1"


class Reply(BaseModel):
    """One model's answer to one prompt.

    Attributes:
        refused: verdict of the keywords.
        unsafe: verdict of the guard model, if there is one.
        tokens: length of the answer.
        degenerate: whether the answer is empty or repeats itself (`degenerate.py`); earlier versions did not record it.
        digest: digest of the answer's text.
        answer: the answer, if answers are kept.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    refused: bool
    unsafe: bool | None = None
    tokens: int
    degenerate: bool | None = None
    digest: str
    answer: str | None = None


class Drift(BaseModel):
    """Difference between the guarded and the unguarded model on a harmless text.

    Attributes:
        first_token_kl: of the first token's distributions, `KL(unguarded || guarded)`, nats.
        tokens: length of the unguarded model's answer.
        base_log_likelihood, guarded_log_likelihood: of that answer, nats.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    first_token_kl: float
    tokens: int
    base_log_likelihood: float
    guarded_log_likelihood: float


class FirstToken(BaseModel):
    """KL divergences of the guarded model's first token, in nats, on a harmless prompt with an image.

    Attributes:
        unguarded: `KL(unguarded || guarded)`, both with the image.
        text_only: `KL(text-only || guarded)`: the unguarded model without the image, the guarded one with it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    unguarded: float
    text_only: float


class Record(BaseModel):
    """One prompt.

    Attributes:
        number: of the prompt in the set, from 0.
        text_only: the unguarded model's reply to the same words without the image; in one record for each text that the set
            does not itself ask in setting `text`.
        gates: by guarded layer, whether the gate was open at the end of the prompt.
        drift: of harmless prompts in setting `text`.
        first_token: of harmless prompts with an image.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    number: int
    id: str
    setting: str
    label: str
    intent: str
    base: Reply
    guarded: Reply
    text_only: Reply | None = None
    gates: dict[str, bool] | None = None
    drift: Drift | None = None
    first_token: FirstToken | None = None


def digest_of(*parts: str) -> str:
    """Short digest of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class RecordFile:
    """Records of one evaluation, in memory and on disk.

    Args:
        path: a new file, or the file of an interrupted evaluation.
        about: identity of models and settings; a file with another identity belongs to another evaluation.

    Attributes:
        found: the existing records, by number.

    Raises:
        OutputRefused: the file has no records, belongs to another evaluation, or cannot be written.
    """

    def __init__(self, path: Path | str, about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._about = {"schema": SCHEMA, **about}
        self.found: dict[int, Record] = {}
        try:
            if self.path.exists():
                self._resume()
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists() or not self.path.stat().st_size:
                self._begin()
        except (OSError, UnicodeDecodeError) as error:
            raise OutputRefused(f"{self.path}: cannot be written or read ({error}); choose another --out") from None

    def add(self, records: Sequence[Record]) -> None:
        """Keep the records of one batch; those that a killed run could still write are there already.

        A record that an earlier version wrote with less in it is written again, in a later line, which is the one that counts.
        """
        new = [record for record in records if self.found.get(record.number) != record]
        try:
            self._append([record.model_dump_json(exclude_none=True) for record in new])
        except OSError as error:
            raise OutputRefused(
                f"{self.path}: cannot be written ({error.strerror}); make room and run it again: what it holds is gone on with"
            ) from None
        self.found |= {record.number: record for record in records}

    def _begin(self) -> None:
        new = not self.path.exists()
        try:
            self._append([to_strict_json(self._about)])
        except OSError:
            if new:
                self.path.unlink(missing_ok=True)
            raise

    def _append(self, lines: Sequence[str]) -> None:
        """All of the lines or none, as far as a disk that fills up can leave it so."""
        with self.path.open("ab", buffering=0) as file:
            held = file.tell()
            try:
                content = "".join(line + "\n" for line in lines).encode()
                if file.write(content) < len(content):  # a disk that is full takes a part of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                os.truncate(file.fileno(), held)
                raise

    def _resume(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        first, *rest = whole.decode("utf-8").splitlines() or [""]
        if whole or not _begins(content, self._about):
            self._require_same(first)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(rest, start=2):
            try:
                record = Record.model_validate_json(line)
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise OutputRefused(
                    f"{self.path}: line {number} is not a record ({said}); choose another --out, or remove it"
                ) from None
            self.found[record.number] = record

    def _require_same(self, header: str) -> None:
        try:
            theirs = from_strict_json(header)
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict) or theirs.get("schema") != SCHEMA:
            raise OutputRefused(f"{self.path}: is not a file of evaluation records ({SCHEMA}); choose another --out")
        ours = json.loads(to_strict_json(self._about))
        differing = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
        if differing is not None:
            raise OutputRefused(
                f"{self.path}: records another evaluation ({differing} was {_short(theirs.get(differing))}, now it is "
                f"{_short(ours.get(differing))}); choose another --out, or remove it"
            )


def _begins(content: bytes, about: Mapping[str, Any]) -> bool:
    """Whether a file without a complete line is a prefix of our first line, from a run killed at its start."""
    return to_strict_json(about).encode().startswith(content)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 48 else f"{text[:45]}..."
