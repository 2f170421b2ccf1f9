"""The user's own text files, for training and for labelling alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_file(path: Path, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a conversation in the model's template), one after the other.

    ``.jsonl`` holds an object with ``text`` or ``messages``, or a list of messages, per line; anything else is one plain
    text.

    Raises:
        ValueError: a file that is not UTF-8, or a line that is none of these, with file and number.
    """
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8"), False
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _line(line, f"{path}:{number}", tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def _line(line: str, where: str, tokenizer: Any) -> tuple[str, bool]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    messages = row.get("messages") if isinstance(row, dict) else row
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"], False
    if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False), True
        except Exception as error:  # a template is a program of the model's author and raises what it likes
            raise ValueError(f"{where}: the tokenizer's chat template refuses it ({error})") from None
    raise ValueError(f'{where}: expected an object with "text" or "messages", or a list of messages')
