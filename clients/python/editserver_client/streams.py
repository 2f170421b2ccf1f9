"""Streams of typed events, opened by the first `for` or by `with`; `async` likewise.

    with client.chat_stream(messages, interventions=[…]) as stream:
        for event in stream:
            if isinstance(event, TextDelta):
                print(event.text, end="")
        print(stream.receipt)

What has come so far stays readable after an error or an early `break`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import TracebackType
from typing import Generic, Self

import httpx

from .events import Event
from .exceptions import APITimeoutError, StreamError
from .receipts import Receipt
from .responses import ChatResponse, CompletionResponse, Readings, Usage
from .sse import SSEDecoder
from .transcript import ResponseT, StreamedChoice, Transcript


class _BaseStream(Generic[ResponseT]):
    """What has come so far; the shorthands are those of the first choice."""

    def __init__(self, response_type: type[ResponseT]) -> None:
        self._transcript = Transcript(response_type)
        self._decoder = SSEDecoder()

    @property
    def choices(self) -> list[StreamedChoice]:
        """Every choice so far, by index."""
        return self._transcript.choices

    @property
    def text(self) -> str:
        """The text so far."""
        return self._transcript.choice(0).text

    @property
    def receipt(self) -> Receipt | None:
        """The receipt; None until it has come, near the end."""
        return self._transcript.choice(0).receipt

    @property
    def inspection(self) -> Readings:
        """The readings so far."""
        return self._transcript.choice(0).inspection

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; None while it runs."""
        return self._transcript.choice(0).finish_reason

    @property
    def usage(self) -> Usage | None:
        """Token counts, once they have come."""
        return self._transcript.usage

    def _take(self, chunk: bytes | None) -> Generator[Event, None, None]:
        """The events that these bytes complete; None is the end of the bytes, which must not come before [DONE]."""
        for data in self._decoder.flush() if chunk is None else self._decoder.feed(chunk):
            yield from self._transcript.feed(data)
            if self._transcript.done:
                return
        if chunk is None:
            raise StreamError("the stream ended before [DONE]")

    def _whole(self) -> ResponseT:
        if not self._transcript.done:
            raise StreamError("the stream was closed, or failed, before its end; see .text for what had come")
        return self._transcript.response()


def _broken(error: httpx.TransportError) -> StreamError | APITimeoutError:
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(f"no further event within the timeout ({type(error).__name__})")
    return StreamError(f"the connection broke in the middle of the stream: {error}")


class Stream(_BaseStream[ResponseT]):
    """Iterator of events and context manager."""

    def __init__(self, response_type: type[ResponseT], connect: Callable[[], httpx.Response]) -> None:
        super().__init__(response_type)
        self._connect = connect
        self._response: httpx.Response | None = None
        self._events = self._run()

    def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = self._connect()
        return self._response

    def _run(self) -> Generator[Event, None, None]:
        response = self._open()
        try:
            for chunk in response.iter_bytes():
                yield from self._take(chunk)
                if self._transcript.done:
                    return
            yield from self._take(None)
        except httpx.TransportError as error:
            raise _broken(error) from error
        finally:
            response.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def final(self) -> ResponseT:
        """Read the rest and return the whole answer, as the non-streaming method would have."""
        for _ in self:
            pass
        return self._whole()

    def close(self) -> None:
        """Hang up; the server stops generating."""
        self._events.close()
        if self._response is not None:
            self._response.close()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(_BaseStream[ResponseT]):
    """Asynchronous iterator of events and context manager."""

    def __init__(self, response_type: type[ResponseT], connect: Callable[[], Awaitable[httpx.Response]]) -> None:
        super().__init__(response_type)
        self._connect = connect
        self._response: httpx.Response | None = None
        self._events = self._run()

    async def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = await self._connect()
        return self._response

    async def _run(self) -> AsyncGenerator[Event, None]:
        response = await self._open()
        try:
            async for chunk in response.aiter_bytes():
                for event in self._take(chunk):
                    yield event
                if self._transcript.done:
                    return
            for event in self._take(None):
                yield event
        except httpx.TransportError as error:
            raise _broken(error) from error
        finally:
            await response.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def final(self) -> ResponseT:
        """Read the rest and return the whole answer, as the non-streaming method would have."""
        async for _ in self:
            pass
        return self._whole()

    async def close(self) -> None:
        """Hang up; the server stops generating."""
        await self._events.aclose()
        if self._response is not None:
            await self._response.aclose()

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


ChatStream = Stream[ChatResponse]
CompletionStream = Stream[CompletionResponse]
AsyncChatStream = AsyncStream[ChatResponse]
AsyncCompletionStream = AsyncStream[CompletionResponse]
