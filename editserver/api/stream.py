"""Our chunks in vLLM's stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from editserver.api.edit import Choice, Edit
from editserver.api.refusal import refusal_choice, without_end


class EditStream:
    """Weaves our chunks into vLLM's stream without reading it, but for the last event of a refused choice.

    vLLM's generator pulls an output from us, then yields what it makes of it. So what an output brought is known before
    its text goes out: prompt readings and firings come before the first delta, and the receipts, made when the outputs
    end, before the usage chunk and ``[DONE]``. After an error there is no receipt.
    """

    def __init__(self, edit: Edit, request_id: str, model: str, kind: str, created: int | None = None) -> None:
        self.edit = edit
        self.kind = kind
        self._head: dict[str, Any] = {
            "id": request_id,
            "object": kind,
            "created": created or int(time.time()),
            "model": model,
        }
        self._before: list[str] = []
        self._after: list[str] = []
        self._last: list[str] = []
        self._refused: set[int] = set()

    def tell(self, choices: list[Choice]) -> None:
        """Note the readings and firings that an output brought, and the message of a choice that a rule refused."""
        for choice in choices:
            refused = choice.refused_at is not None
            at = self._before if choice.read_to == 0 or refused else self._after
            readings, events = self.edit.new_readings(choice), self.edit.new_events(choice)
            if readings is not None:
                at.append(self._chunk(choice, "inspection", readings))
            if events:
                self._before.append(self._chunk(choice, "interventions", {"events": events}))
            if refused and choice.index not in self._refused:
                self._refused.add(choice.index)
                said = refusal_choice(self.kind, choice.index, choice.message)
                self._last.append(self._event({"choices": [said]}))

    async def until_end(self, results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """``results``, and the receipts once they have ended well."""
        async with aclosing(results) as closing:  # type: ignore[type-var]
            async for item in closing:
                yield item
                # vLLM has made its events of the output; those that it made none of lose nothing of ours.
                self._before += self._take("_after") + self._take("_last")
        for index in sorted(self.edit.choices) if self.edit.compiled.entries else ():
            choice = self.edit.choices[index]
            self._before.append(self._chunk(choice, "interventions", self.edit.receipt(choice)))

    async def run(self, upstream: Any) -> AsyncIterator[str]:
        """vLLM's server-sent events with ours."""
        async with aclosing(upstream) as events:
            async for event in events:
                for chunk in self._take("_before"):
                    yield chunk
                left = without_end(event, self._refused)
                if left is not None:
                    yield left
                for chunk in self._take("_after"):
                    yield chunk

    def _take(self, name: str) -> list[str]:
        chunks: list[str] = getattr(self, name)
        setattr(self, name, [])
        return chunks

    def _chunk(self, choice: Choice, name: str, part: Any) -> str:
        return self._event({"choices": [], "choice": choice.index, name: part})

    def _event(self, part: dict[str, Any]) -> str:
        return f"data: {json.dumps(self._head | part, ensure_ascii=False)}\n\n"
