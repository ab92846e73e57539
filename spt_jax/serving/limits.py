"""Limits on the size and duration of requests; a body is read completely before the request is processed."""

import asyncio
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol


class BodyLimits:
    """ASGI middleware that answers 413 to a body that is too large, and 408 to one that does not arrive in time."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float):
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def refuse(status: int, message: str) -> None:
            content = error_body(message, "invalid_request_error")
            await JSONResponse(content, status, headers={"connection": "close"})(scope, receive, send)

        try:
            async with asyncio.timeout(self._seconds):
                messages = await self._read(receive)
        except TimeoutError:
            await refuse(408, f"the body did not arrive within {self._seconds:g} seconds")
            return
        if messages is None:
            await refuse(413, f"the body has more than {self._max_bytes} bytes")
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> list[Message] | None:
        """Returns the messages of the body; None if it is too large."""
        messages, size = [], 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body"):
                return messages


class TimedHeads(H11Protocol):
    """Uvicorn's HTTP connection, closed if a request's head does not arrive in time.

    Uvicorn itself only closes connections that stay idle after an answer.

    Attributes:
      seconds: the time limit for a request's head, counted from the connection or, for a further request on the
        connection, from its first byte.
    """

    seconds = 30.0
    _closing: Any = None  # a timer of the event loop

    def connection_made(self, transport: Any) -> None:  # uvloop's transports are not asyncio.Transport
        super().connection_made(transport)
        self._closing = self.loop.call_later(self.seconds, self._close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._awaits_head:
            self._stop()
        elif self._closing is None:
            self._closing = self.loop.call_later(self.seconds, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _stop(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def _close(self) -> None:
        self._closing = None
        if self._awaits_head:
            self.transport.close()


def timed_heads(within: float) -> type[TimedHeads]:
    """Returns a connection class that allows `within` seconds for a request's head."""

    class Timed(TimedHeads):
        seconds = within

    return Timed


def error_body(message: str, kind: str, **more: Any) -> dict[str, Any]:
    """Returns an error body in the format of OpenAI's API."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None, **more}}
