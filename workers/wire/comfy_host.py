"""What the ComfyUI process is, as data: taken in the driver, applied in a worker before it imports ComfyUI."""

from __future__ import annotations

import asyncio
import importlib
import os
import pickle
import sys
from typing import Any

from .messages import HostEnvironment
from .path_modules import PathModules

FOLDER_ATTRIBUTES = ("base_path", "models_dir", "output_directory", "temp_directory", "input_directory")


def describe() -> HostEnvironment:
    """The running ComfyUI process as a HostEnvironment. Call it in the driver."""
    import comfy
    import comfy.cli_args
    import comfy.model_management
    import folder_paths

    folders = {name: getattr(folder_paths, name) for name in FOLDER_ATTRIBUTES if hasattr(folder_paths, name)}
    folders["folder_names_and_paths"] = dict(folder_paths.folder_names_and_paths)
    root = next(iter(comfy.__path__))
    return HostEnvironment(
        comfy_root=os.path.dirname(os.path.abspath(root)),
        arguments=pickle.dumps(vars(comfy.cli_args.args)),
        folders=pickle.dumps(folders),
        device_type=comfy.model_management.get_torch_device().type,
    )


def device_uuid(device: Any) -> str:
    """What tells one physical accelerator from another in all processes; "" for a CPU or where torch does not say."""
    if device.type == "cpu":
        return ""
    import torch

    properties = torch.get_device_module(device).get_device_properties(device)
    return str(getattr(properties, "uuid", ""))


def apply(environment: HostEnvironment) -> None:
    """Make this process see ComfyUI as the driver does: command line, folders, modules named by path."""
    sys.argv = sys.argv[:1]
    import comfy.cli_args

    arguments = comfy.cli_args.args
    vars(arguments).update(pickle.loads(environment.arguments))
    arguments.cpu = environment.device_type == "cpu"
    import folder_paths

    for name, value in pickle.loads(environment.folders).items():
        setattr(folder_paths, name, value)
    # as in ComfyUI before its nodes, from which on its comfy/utils.py would take the name
    importlib.import_module("utils.extra_config")
    if not any(isinstance(finder, PathModules) for finder in sys.meta_path):
        sys.meta_path.append(PathModules(with_server))


def with_server() -> None:
    """Have the object that ComfyUI's server is, which packs register pages with: serving nobody, sending nothing."""
    import server
    from aiohttp import web

    if hasattr(server.PromptServer, "instance"):
        return

    class Unserved(server.PromptServer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.app = web.Application()
            self.routes = web.RouteTableDef()
            self.loop = asyncio.new_event_loop()
            self.supports: list[str] = []
            self.on_prompt_handlers: list[Any] = []
            self.sockets: dict[str, Any] = {}
            self.client_id = self.last_node_id = None
            self.number = 0

        def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
            pass

    server.PromptServer.instance = Unserved()
