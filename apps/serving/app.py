"""The HTTP routes of one guarded model."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Coroutine
from datetime import datetime
from typing import Any, TypeVar

from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ...graphs.errors import GuardError, RunFailed
from ...runtime.guarded import GuardedVLM
from .access import AccessLog, access_of
from .admission import Admission
from .answering import Answering, Limits
from .auth import require_key, require_local_name
from .body import Bodies, read_json
from .chat_request import ChatRequest, read_chat_request
from .context import context_limit
from .http_errors import ApiError, ClientGone
from .prometheus_metrics import Metrics
from .replies import Reply, event, model_card
from .settings import ServeSettings

T = TypeVar("T")


class Service:
    """One guarded model, answering.

    Attributes:
        admission: who may come in.
        app: the ASGI application.
    """

    def __init__(self, vlm: GuardedVLM, settings: ServeSettings) -> None:
        self.vlm, self.settings = vlm, settings
        self.admission = Admission(settings.places(bool(vlm.manifest.engines)), settings.queue)
        self.metrics = Metrics(vlm, settings.name, self.admission)
        self._fingerprint = _fingerprint(vlm)
        self._limits = Limits(settings.max_prompt_tokens, context_limit(vlm, settings))
        self._under_way: set[Answering] = set()
        self._bodies = Bodies((self.admission.places + self.admission.queue) * settings.max_body)
        self.app = _routes(self)

    async def chat(self, http: Request) -> Response:
        """`/v1/chat/completions`, from the door to the answer's beginning."""
        began = time.monotonic()
        self.admission.require_room()  # before any of the body is read, and again when it has come
        content = await read_json(http, self.settings.max_body, self._bodies, self.settings.timeout)
        visit = self.admission.enter()
        try:
            async with asyncio.timeout_at(
                asyncio.get_running_loop().time() + began + self.settings.timeout - time.monotonic()
            ):
                chat = read_chat_request(content, self.settings, self.vlm.sees)
                del content
                await unless_gone(http.receive, visit.place())

            def ended(answering: Answering) -> None:
                visit.leave()
                self._under_way.discard(answering)
                self.metrics.answer_ended(answering.made)

            deadline = began + self.settings.timeout
            answering = Answering(self.vlm, chat, self._limits, began, deadline, ended)
        except BaseException as error:
            visit.leave()
            if isinstance(error, TimeoutError):
                raise ApiError(
                    503, "no place became free in time; try again later", code="timeout", retry_after=1
                ) from None
            raise
        self._under_way.add(answering)
        access_of(http.scope).made = answering.made
        reply = Reply(self.settings.name, self._fingerprint)
        try:
            await unless_gone(http.receive, answering.begun())
            if chat.streams:
                return _Stream(self, reply, chat, answering)
            await unless_gone(http.receive, _read(answering))
        except BaseException:
            answering.stop("cancelled")
            raise
        return JSONResponse(reply.completion(answering.made))

    def stop_answers(self) -> None:
        """Stop running answers and reject queued requests; each caller receives an error."""
        self.admission.close()
        for answering in list(self._under_way):
            answering.abandon()

    def refusal(self, error: GuardError) -> ApiError:
        """The API error for a `GuardError`: the caller's fault, unless a runtime failed. Paths are not sent to the caller."""
        if isinstance(error, RunFailed):
            return ApiError(500, "the model cannot be run on this request")
        line = " ".join(str(error).split())
        for folder in (self.vlm.chat.folder, self.vlm.package.root):
            line = line.replace(str(folder), self.settings.name)
        return ApiError(400, line)


class _Stream(StreamingResponse):
    """Server-sent events; an error after the first of them is one of them."""

    def __init__(self, service: Service, reply: Reply, chat: ChatRequest, answering: Answering) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), headers=headers, media_type="text/event-stream")
        self._service, self._reply, self._chat, self._answering = service, reply, chat, answering

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._reply.chunks(self._answering, self._chat.tells_usage):
                yield event(chunk)
        except ApiError as refusal:
            yield event(refusal.to_json())
        except GuardError as error:
            yield event(self._service.refusal(error).to_json())
        except Exception:
            yield event(ApiError(500, "something went wrong here; the log has it").to_json())
            raise
        else:
            yield event("[DONE]")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.stream_response(send))
        finally:
            self._answering.stop("cancelled")  # has no effect on one that is complete


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work as long as the client is connected. The request's body must have been read.

    Raises:
        ClientGone: the client left; the work was cancelled.
    """
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(answering: Answering) -> None:
    async for _ in answering.pieces():
        pass


def _fingerprint(vlm: GuardedVLM) -> str:
    """Of the decoder that answers, in all its engines: the same graph, the same guard."""
    manifest = vlm.manifest
    parts = [engine.path for engine in manifest.engines if engine.is_decoder] or [manifest.decoder]
    digests = [manifest.files[part].sha256 or "none" for part in parts]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return f"fp_{whole[:12]}"


def _routes(service: Service) -> FastAPI:
    # No pages about the API: they would load scripts from elsewhere, and describe the server to unknown clients.
    app = FastAPI(title="vlmguard", docs_url=None, redoc_url=None, openapi_url=None)
    settings = service.settings
    card = model_card(settings.name, int(datetime.fromisoformat(service.vlm.manifest.created).timestamp()))

    def allowed(http: Request) -> None:
        require_local_name(settings, http.headers.get("host"))
        require_key(settings, http.headers.get("authorization"))

    guarded_routes = {"dependencies": [Depends(allowed)], "response_model": None}

    @app.post("/v1/chat/completions", **guarded_routes)
    async def chat(http: Request) -> Response:
        return await service.chat(http)

    @app.get("/v1/models", **guarded_routes)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", **guarded_routes)
    async def model(name: str) -> dict[str, Any]:
        if name != settings.name:
            raise ApiError(404, "this model does not exist", code="model_not_found", param="model")
        return card

    @app.get("/metrics", **guarded_routes)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/healthz")
    @app.get("/healthz/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/healthz/ready", response_model=None)
    async def ready() -> Response:
        if service.admission.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

    @app.exception_handler(ApiError)
    async def refused(http: Request, error: ApiError) -> Response:
        return JSONResponse(error.to_json(), error.status, error.headers)

    @app.exception_handler(GuardError)
    async def refused_by_model(http: Request, error: GuardError) -> Response:
        return await refused(http, service.refusal(error))

    @app.exception_handler(HTTPException)
    async def no_such_route(http: Request, error: HTTPException) -> Response:
        sentence = (
            "this server has no such path; ask /v1/chat/completions" if error.status_code == 404 else error.detail
        )
        response = await refused(http, ApiError(error.status_code, sentence))
        response.headers.update(error.headers or {})
        return response

    app.add_middleware(AccessLog, ended=service.metrics.request_ended)
    return app
