"""A client of ComfyUI's HTTP interface that also records what its websocket says."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import websocket

from .api import ApiClient, Prompt, PromptError

__all__ = ["ComfyClient", "Event", "Prompt", "PromptError", "Result"]

log = logging.getLogger("raylight.host")

PREVIEW = "preview"
"""Kind of the events made from binary messages, which are preview images."""


@dataclass(frozen=True)
class Event:
    """One websocket message: `at` is `time.monotonic()` of its arrival."""

    at: float
    kind: str
    data: dict[str, Any]
    prompt_id: str = ""


@dataclass(frozen=True)
class Result:
    """What a finished prompt left: outputs by node id, and the events that arrived meanwhile."""

    prompt_id: str
    outputs: dict[str, Any]
    events: list[Event] = field(repr=False)

    def progress(self, node: str = "") -> list[tuple[float, int, int]]:
        """Time, value and maximum of every progress event, of one node or of all."""
        found = [event for event in self.events if event.kind == "progress" and node in ("", event.data.get("node"))]
        return [(event.at, int(event.data["value"]), int(event.data["max"])) for event in found]

    def step_seconds(self, node: str = "") -> list[float]:
        """Seconds between consecutive steps; the first step has no start and is not counted."""
        steps = [(at, value) for at, value, _ in self.progress(node) if value > 0]
        return [later[0] - at for (at, value), later in itertools.pairwise(steps) if later[1] == value + 1]

    def node_seconds(self) -> dict[str, float]:
        """Seconds each executed node took, by its id."""
        marks = [(event.at, event.data.get("node")) for event in self.events if event.kind == "executing"]
        spans = itertools.pairwise(marks)
        return {str(node): later - at for (at, node), (later, _) in spans if node is not None}

    def previews(self) -> list[Event]:
        """The preview images that arrived; `data` has their size in bytes."""
        return [event for event in self.events if event.kind == PREVIEW]


class ComfyClient(ApiClient):
    """Queues prompts, waits for them and records their events; see ApiClient for its arguments."""

    def __init__(self, url: str, *, alive: Callable[[], None] | None = None) -> None:
        super().__init__(url, alive=alive)
        self.events: list[Event] = []
        self._current = ""
        self._closing = False
        address = url.replace("http", "ws", 1)
        self._socket = websocket.create_connection(f"{address}/ws?clientId={self.id}", timeout=30)
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._listen, name="comfy-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the connection."""
        self._closing = True
        # Wakes the listening thread, which a plain close() would not
        self._socket.shutdown()
        self._thread.join(5)

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def wait(self, prompt_id: str, *, timeout: float = 300.0) -> Result:
        """Wait for a queued prompt; see ApiClient.outputs."""
        outputs = self.outputs(prompt_id, timeout=timeout)
        return Result(prompt_id, outputs, self._events_until_end(prompt_id))

    def run(self, prompt: Prompt, *, timeout: float = 300.0) -> Result:
        """Queue a prompt and wait for it."""
        return self.wait(self.queue(prompt), timeout=timeout)

    def events_of(self, prompt_id: str) -> list[Event]:
        """The events recorded while that prompt ran."""
        return [event for event in list(self.events) if event.prompt_id == prompt_id]

    def _events_until_end(self, prompt_id: str) -> list[Event]:
        """The history is written before the last event is sent."""
        end = time.monotonic() + 5
        while time.monotonic() < end:
            events = self.events_of(prompt_id)
            if any(event.kind == "executing" and event.data.get("node") is None for event in events):
                break
            time.sleep(0.01)
        return self.events_of(prompt_id)

    def _listen(self) -> None:
        while not self._closing:
            try:
                message = self._socket.recv()
            except (websocket.WebSocketException, OSError) as error:
                if not self._closing:
                    log.debug("websocket ended: %s", error)
                return
            at = time.monotonic()
            if isinstance(message, bytes):
                self.events.append(Event(at, PREVIEW, {"bytes": len(message)}, self._current))
            elif message:
                content = json.loads(message)
                data = content.get("data") or {}
                if content["type"] == "execution_start":
                    self._current = data["prompt_id"]
                self.events.append(Event(at, content["type"], data, data.get("prompt_id") or self._current))
