"""What operators ask: is it up, which version, how busy; and the API's own documents."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from hexad import __version__
from hexad.server.http import JSONResponse
from hexad.server.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when requests are served; 503 before the model is loaded and when the server shuts down."""
    refusal = request.app.state.server.refusal()
    if refusal is not None:
        raise refusal
    return JSONResponse({"status": "ok"})


@router.get("/ping")
@router.post("/ping")
async def ping(request: Request) -> Response:
    """`/health`, under SageMaker's name."""
    return await health(request)


@router.get("/version")
async def version() -> Response:
    """hexad's version."""
    return JSONResponse({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The server's figures, in Prometheus' text format. While the model loads, HTTP's and the process's."""
    return Response(request.app.state.server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/load")
async def load(request: Request) -> Response:
    """How many requests are being answered."""
    return JSONResponse({"server_load": request.app.state.server.metrics.active})


for path, asked in (("/health", health), ("/ping", ping)):  # as some load balancers ask
    router.add_api_route(path, asked, methods=["HEAD"], include_in_schema=False)
