"""A client of ComfyUI's HTTP interface, which also records what its websocket says."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import websocket

log = logging.getLogger("raylight.host")

Prompt = dict[str, dict[str, Any]]
PREVIEW = "preview"
"""Kind of the events made from binary messages, which are preview images."""


class PromptError(RuntimeError):
    """A prompt was refused, failed or was interrupted.

    Attributes:
        kind: "refused", "failed" or "interrupted".
        exception: type name of the exception in the node, for "failed".
        node: id of the node, where one is known.
        detail: ComfyUI's own report.
    """

    def __init__(self, kind: str, text: str, *, exception: str = "", node: str = "", detail: Any = None) -> None:
        super().__init__(f"prompt {kind}: {text}")
        self.kind = kind
        self.text = text
        self.exception = exception
        self.node = node
        self.detail = detail


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


class ComfyClient:
    """Queues prompts and waits for them.

    Args:
        url: where ComfyUI answers.
        alive: called while waiting; raises when the server has ended.
    """

    def __init__(self, url: str, *, alive: Callable[[], None] | None = None) -> None:
        self.url = url
        self.id = uuid.uuid4().hex
        self.events: list[Event] = []
        self._alive = alive
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

    def get(self, path: str, *, timeout: float = 60.0) -> Any:
        """GET a JSON document."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout) as response:
            return json.load(response)

    def post(self, path: str, body: Any, *, timeout: float = 60.0) -> Any:
        """POST a JSON document; the answer may be empty."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read()
        return json.loads(text) if text else None

    def queue(self, prompt: Prompt) -> str:
        """Queue an API prompt and return its id.

        Raises:
            PromptError: ComfyUI refuses it; `detail` has its node_errors.
        """
        try:
            return str(self.post("/prompt", {"prompt": prompt, "client_id": self.id})["prompt_id"])
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            report = json.load(error)
            found = report.get("node_errors") or {}
            causes = [
                f"{node} ({entry.get('class_type')}): {cause['message']}: {cause['details']}"
                for node, entry in found.items()
                for cause in entry["errors"]
            ]
            text = "; ".join(causes) or str(report.get("error"))
            raise PromptError("refused", text, node=next(iter(found), ""), detail=report) from error

    def wait(self, prompt_id: str, *, timeout: float = 300.0) -> Result:
        """Wait for a queued prompt.

        Raises:
            PromptError: it failed or was interrupted.
            TimeoutError: it is not finished after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self._alive is not None:
                self._alive()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and "status" in entry:
                self._raise_for(entry["status"])
                return Result(prompt_id, entry["outputs"], self._events_until_end(prompt_id))
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} is not finished after {timeout:.0f} s")

    def run(self, prompt: Prompt, *, timeout: float = 300.0) -> Result:
        """Queue a prompt and wait for it."""
        return self.wait(self.queue(prompt), timeout=timeout)

    def interrupt(self) -> None:
        """Cancel the running prompt."""
        self.post("/interrupt", {})

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask ComfyUI to give up models and cached results; it does so within about a second."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def object_info(self, node: str = "") -> dict[str, Any]:
        """ComfyUI's description of one node, or of all."""
        info: dict[str, Any] = self.get(f"/object_info/{urllib.parse.quote(node)}" if node else "/object_info")
        return info

    def events_of(self, prompt_id: str) -> list[Event]:
        """The events recorded while that prompt ran."""
        return [event for event in list(self.events) if event.prompt_id == prompt_id]

    def _raise_for(self, status: dict[str, Any]) -> None:
        for kind, data in status.get("messages", ()):
            if kind == "execution_error":
                raise PromptError(
                    "failed",
                    f"{data['exception_type']} in {data['node_type']}: {data['exception_message'].strip()}",
                    exception=data["exception_type"],
                    node=str(data["node_id"]),
                    detail=data,
                )
            if kind == "execution_interrupted":
                raise PromptError("interrupted", str(data.get("node_type")), node=str(data.get("node_id")), detail=data)
        if status.get("status_str") != "success":
            raise PromptError("failed", str(status), detail=status)

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
