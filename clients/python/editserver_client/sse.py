"""Server-sent events (WHATWG HTML, section 9.2): bytes in, the `data` of each event out."""

from __future__ import annotations

import codecs
import re

# Not str.splitlines: it also splits at U+2028 and others, which JSON text may contain unescaped.
_LINE_END = re.compile(r"\r\n|\n|\r")


class SSEDecoder:
    """Incremental decoder; chunks may end anywhere, inside a character or between CR and LF too."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._unfinished: list[str] = []
        self._after_cr = False
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that `chunk` completes; comments and other fields are skipped."""
        text = self._utf8.decode(chunk)
        if self._after_cr and text:
            text = text.removeprefix("\n")
            self._after_cr = False
        *lines, rest = _LINE_END.split(text)
        if text.endswith("\r"):
            self._after_cr = True
        events: list[str] = []
        for line in lines:
            self._unfinished.append(line)
            self._take_line("".join(self._unfinished), events)
            self._unfinished.clear()
        if rest:
            self._unfinished.append(rest)
        return events

    def flush(self) -> list[str]:
        """The data of an event that the end of the stream completes (some servers leave the last blank line out)."""
        events: list[str] = []
        self._take_line("".join(self._unfinished), events)
        self._take_line("", events)
        self._unfinished.clear()
        return events

    def _take_line(self, line: str, events: list[str]) -> None:
        if not line:
            if self._data:
                events.append("\n".join(self._data))
                self._data.clear()
            return
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))
