"""A client of ComfyUI's HTTP interface, of the standard library alone."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any

Prompt = dict[str, dict[str, Any]]


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


class ApiClient:
    """Queues prompts and waits for them.

    Args:
        url: where ComfyUI answers.
        alive: called while waiting; raises when the server has ended.
    """

    def __init__(self, url: str, *, alive: Callable[[], None] | None = None) -> None:
        self.url = url
        self.id = uuid.uuid4().hex
        self._alive = alive

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

    def outputs(self, prompt_id: str, *, timeout: float = 300.0) -> dict[str, Any]:
        """Wait for a queued prompt, and return its outputs by node id.

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
                outputs: dict[str, Any] = entry["outputs"]
                return outputs
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} is not finished after {timeout:.0f} s")

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
