"""What a client may send, and for how long: bodies are read whole, up to a size and a time, before anything is done."""

import asyncio
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimits:
    """ASGI middleware that answers 413 to a body that is too large, and 408 to one that does not come."""

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
            await refuse(408, f"the body did not come within {self._seconds:g} seconds")
            return
        if messages is None:
            await refuse(413, f"the body has more than {self._max_bytes} bytes")
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> list[Message] | None:
        """All of the body; None if it is too large."""
        messages, size = [], 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body"):
                return messages


def error_body(message: str, kind: str, **more: Any) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None, **more}}
