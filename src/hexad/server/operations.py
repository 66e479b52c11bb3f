"""What operators ask: is it up, which version, how busy; and the API's own documents."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from hexad import __version__
from hexad.server.http import JSONResponse

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when requests are served; 503 before the model is loaded and when the server shuts down."""
    refusal = request.app.state.server.refusal()
    if refusal is not None:
        raise refusal
    return JSONResponse({"status": "ok"})


@router.api_route("/ping", methods=["GET", "POST"])
async def ping(request: Request) -> Response:
    """`/health`, under SageMaker's name."""
    return await health(request)


@router.get("/version")
async def version() -> Response:
    """hexad's version."""
    return JSONResponse({"version": __version__})
