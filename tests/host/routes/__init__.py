"""A route for tests of ComfyUI's server; apart from the test nodes, which also run where there is none."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import execution
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
STARTED = time.time()


@PromptServer.instance.routes.post("/raylight-test/validate")
async def validate(request: web.Request) -> web.Response:
    """Whether ComfyUI would accept a prompt, without running it."""
    prompt = (await request.json())["prompt"]
    if manager := getattr(PromptServer.instance, "node_replace_manager", None):
        manager.apply_replacements(prompt)
    fine, error, _, nodes = await execution.validate_prompt("validate", prompt, None)
    return web.json_response({"fine": fine, "error": error, "nodes": nodes})


@PromptServer.instance.routes.post("/raylight-test/restart")
async def restart(request: web.Request) -> web.Response:
    """As ComfyUI-Manager restarts ComfyUI: the program replaces itself, and keeps its process."""
    asyncio.get_running_loop().call_later(0.1, os.execv, sys.executable, [sys.executable, *sys.argv])
    return web.json_response({})


@PromptServer.instance.routes.get("/raylight-test/started")
async def started(request: web.Request) -> web.Response:
    """When this program began."""
    return web.json_response(STARTED)
