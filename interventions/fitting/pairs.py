"""Contrastive texts: pairs (or two lists) that differ in one thing, read from files and cut into tokens.

What a line of a ``.jsonl`` file may be::

    {"positive": "text", "negative": "text"}                              two texts, all of whose tokens count
    {"prompt": "text", "positive": "text", "negative": "text"}            two completions; only their tokens count
    {"prompt": [messages], "positive": "text", "negative": "text"}        the same after a chat template
    {"positive": [messages], "negative": [messages]}                      two chats; the last turn counts

A ``.csv`` file has the columns ``positive`` and ``negative`` (or exactly two, without those names, in that order), and
perhaps ``prompt``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interventions.wording import choices, nearest, show

Message = Mapping[str, str]

_FIELDS = ("prompt", "positive", "negative")


class PairsError(ValueError):
    """A file of examples that cannot be used; the message names the file, and the line where there is one."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and the position of the first token that counts."""

    token_ids: list[int]
    start: int


@dataclass(frozen=True)
class Passage:
    """One text, and what precedes it.

    Attributes:
        prompt: text or chat messages before the part that counts; ``""`` for a text of its own.
        text: the part that counts. Empty only after messages: then their last turn counts, with the tokens that open
            the answer.
    """

    prompt: str | tuple[Message, ...] = ""
    text: str = ""

    def encode(self, tokenizer: Any) -> Encoded:
        """Token ids as a server would make them, and where the part that counts begins.

        Plain text gets the special tokens that the tokenizer adds by itself; a chat only those of its template, which
        opens the assistant's turn before ``text``. A token that spans the border belongs to the part that counts.

        Raises:
            PairsError: messages, and a tokenizer without a chat template.
        """
        if isinstance(self.prompt, str):
            whole = tokenizer.encode(self.prompt + self.text)
            return Encoded(whole, _shared(whole, tokenizer.encode(self.prompt)) if self.prompt else 0)
        if not tokenizer.chat_template:
            raise PairsError(
                "the examples are chats, but this model's tokenizer has no chat template; give plain texts"
            )
        opened = _template(tokenizer, self.prompt, True)
        before = opened if self.text else _template(tokenizer, self.prompt[:-1], False)
        whole = tokenizer.encode(opened + self.text, add_special_tokens=False)
        return Encoded(whole, _shared(whole, tokenizer.encode(before, add_special_tokens=False)))


def _template(tokenizer: Any, messages: Sequence[Message], open_answer: bool) -> str:
    if not messages:
        return ""
    return str(
        tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=open_answer
        )
    )


def _shared(whole: Sequence[int], part: Sequence[int]) -> int:
    """Length of the longest common prefix, short of the whole: at least one token counts."""
    n = next((i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))
    return min(n, len(whole) - 1)


@dataclass(frozen=True)
class Examples:
    """Texts that have a property and texts that lack it.

    Attributes:
        positive, negative: the texts; the i-th ones belong together where ``paired``.
        paired: whether each positive has its own negative.
        sha256: of the file's bytes (of both files' bytes one after the other for two files).
        source: the file's name, without its folder.
    """

    positive: tuple[Passage, ...]
    negative: tuple[Passage, ...]
    paired: bool
    sha256: str
    source: str

    @property
    def in_context(self) -> bool:
        """Whether what counts follows a prompt (completions, chats); else the texts stand on their own."""
        return any(bool(passage.prompt) for passage in (*self.positive, *self.negative))

    def groups(self) -> tuple[list[int], list[int]]:
        """A number for each positive and each negative: equal where they share a text, or a pair does.

        What shares a number must lie on one side of a split, or texts that were fitted on would be held out too.
        """
        texts = [*self.positive, *self.negative]
        first: dict[tuple[Any, str], int] = {}
        parent = list(range(len(texts)))

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for i, passage in enumerate(texts):
            same = first.setdefault((json.dumps(passage.prompt), passage.text), i)
            parent[root(i)] = root(same)
        if self.paired:
            for i in range(len(self.positive)):
                parent[root(len(self.positive) + i)] = root(i)
        roots = [root(i) for i in range(len(texts))]
        return roots[: len(self.positive)], roots[len(self.positive) :]


def read_pairs(path: Path) -> Examples:
    """Read a ``.jsonl`` or ``.csv`` file of pairs (forms: see the module).

    Raises:
        PairsError: no such file, another kind of file, or a line that is no pair (``FILE:LINE``).
    """
    data = _read(path)
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise PairsError(
            f"{path}: pairs are read from .jsonl or .csv files; for two lists give --positive and --negative"
        )
    rows = _json_rows(path, data) if suffix == ".jsonl" else _csv_rows(path, data)
    pairs = [_pair(row, f"{path}:{line}") for line, row in rows]
    if not pairs:
        raise PairsError(f"{path}: holds no pairs")
    positive, negative = zip(*pairs, strict=True)
    return Examples(positive, negative, True, hashlib.sha256(data).hexdigest(), path.name)


def read_texts(positive: Path, negative: Path) -> Examples:
    """Two plain text files with one text a line; empty lines are skipped, nothing pairs the lines.

    Raises:
        PairsError: a file that does not exist, is not UTF-8 or is empty.
    """
    files = [_read(positive), _read(negative)]
    sides = []
    for path, data in zip((positive, negative), files, strict=True):
        texts = [line.strip() for line in _text(path, data).splitlines()]
        passages = tuple(Passage(text=text) for text in texts if text)
        if not passages:
            raise PairsError(f"{path}: holds no texts")
        sides.append(passages)
    both = {passage.text for passage in sides[0]} & {passage.text for passage in sides[1]}
    if both:
        raise PairsError(f"{positive}, {negative}: {show(min(both))} is in both files")
    sha256 = hashlib.sha256(b"".join(files)).hexdigest()
    return Examples(sides[0], sides[1], False, sha256, f"{positive.name}, {negative.name}")


def read_prompts(path: Path) -> list[str]:
    """A text file with one prompt a line; empty lines are skipped.

    Raises:
        PairsError: a file that does not exist, is not UTF-8 or is empty.
    """
    prompts = [line.strip() for line in _text(path, _read(path)).splitlines() if line.strip()]
    if not prompts:
        raise PairsError(f"{path}: holds no prompts")
    return prompts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PairsError(f"{path}: cannot be read ({error.strerror})") from None


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PairsError(f"{path}:{line}: is not UTF-8 text") from None


def _json_rows(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like, which end lines there.
    for line, text in enumerate(_text(path, data).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise PairsError(f"{path}:{line}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise PairsError(f'{path}:{line}: expected an object {{"positive": …, "negative": …}}, got {show(row)}')
        yield line, row


def _csv_rows(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(_text(path, data), newline=""), strict=True)
    names: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise PairsError(f"{path}:{line}: is not CSV ({error})") from None
        here, line = line, reader.line_num + 1
        if not cells:
            continue
        if names is None:
            header = [cell.strip().lower() for cell in cells]
            named = {"positive", "negative"} <= set(header)
            names = header if named else ["positive", "negative"]
            if named:
                continue
        if len(cells) != len(names):
            raise PairsError(f"{path}:{here}: has {len(cells)} columns; expected {len(names)} ({choices(names)})")
        yield here, dict(zip(names, cells, strict=True))


def _pair(row: Mapping[str, Any], where: str) -> tuple[Passage, Passage]:
    for key in row:
        if key not in _FIELDS:
            raise PairsError(
                f"{where}: unknown field {show(key)}; a pair has {choices(_FIELDS)}.{nearest(key, _FIELDS)}"
            )
    for key in ("positive", "negative"):
        if key not in row:
            raise PairsError(f"{where}: {key} is missing; a pair has positive and negative")
    prompt = row.get("prompt", "")
    if isinstance(prompt, list):
        prompt = _messages(prompt, f"{where}: prompt")
    elif not isinstance(prompt, str):
        raise PairsError(f"{where}: prompt: expected a string or a list of messages, got {show(prompt)}")
    sides = [_side(row[key], prompt, f"{where}: {key}") for key in ("positive", "negative")]
    if isinstance(row["positive"], str) != isinstance(row["negative"], str):
        raise PairsError(f"{where}: positive and negative must both be strings or both be lists of messages")
    if sides[0] == sides[1]:
        raise PairsError(f"{where}: positive and negative are the same")
    return sides[0], sides[1]


def _side(value: Any, prompt: str | tuple[Message, ...], where: str) -> Passage:
    if isinstance(value, str):
        if not value.strip():
            raise PairsError(f"{where}: is empty")
        return Passage(prompt, value)
    if not isinstance(value, list):
        raise PairsError(f"{where}: expected a string or a list of messages, got {show(value)}")
    if prompt:
        raise PairsError(f"{where}: a chat has its own prompt; leave the field prompt out")
    messages = _messages(value, where)
    if messages[-1]["role"] == "assistant":
        if not messages[-1]["content"].strip():
            raise PairsError(f"{where}[{len(messages) - 1}].content: is empty")
        if len(messages) == 1:
            raise PairsError(f"{where}: the assistant's turn needs a turn before it")
        return Passage(messages[:-1], messages[-1]["content"])
    return Passage(messages)


def _messages(value: list[Any], where: str) -> tuple[Message, ...]:
    if not value:
        raise PairsError(f"{where}: the list of messages is empty")
    messages = []
    for i, message in enumerate(value):
        shape = isinstance(message, dict) and set(message) == {"role", "content"}
        if not shape or not all(isinstance(part, str) for part in message.values()):
            raise PairsError(f'{where}[{i}]: expected {{"role": str, "content": str}}, got {_brief(message)}')
        messages.append(dict(message))
    return tuple(messages)


def _brief(message: Any) -> str:
    return f"an object with {choices(message)}" if isinstance(message, dict) else show(message)
