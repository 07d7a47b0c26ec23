"""What ComfyUI's server answers for this pack beside the nodes."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ..workers.driver import status

STATUS = "/raylight/status"


def publish(module: Any) -> None:
    """Add the routes to ComfyUI's server.

    Args:
        module: `server`, or None where ComfyUI has not imported it: its nodes are used without one.
    """
    routes = getattr(getattr(getattr(module, "PromptServer", None), "instance", None), "routes", None)
    if routes is not None:
        routes.get(STATUS)(_status)


async def _status(_: web.Request) -> web.Response:
    """The pool as JSON: of what this process knows, so that it answers whatever workers and the queue do."""
    return web.json_response(status.now())
