"""Queues an API prompt, shows its progress, and saves what it makes into this folder."""

import argparse
import asyncio
import json
import sys
import uuid
from pathlib import Path

import aiohttp


async def main(file: Path, url: str) -> None:
    client, prompt = uuid.uuid4().hex, json.loads(file.read_text(encoding="utf-8"))
    async with aiohttp.ClientSession(url) as session, session.ws_connect(f"/ws?clientId={client}") as socket:
        async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as answer:
            queued = await answer.json()
            if answer.status != 200:
                sys.exit(f"ComfyUI refuses the prompt: {json.dumps(queued, indent=2)}")
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # a preview
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") != queued["prompt_id"]:
                continue
            if kind == "progress":
                print(f"step {data['value']} of {data['max']}", flush=True)
            elif kind == "execution_error":
                sys.exit(f"{data['node_type']}: {data['exception_message']}")
            elif kind == "executed":
                for made in (data["output"] or {}).get("images", []):
                    async with session.get("/view", params=made) as picture:
                        Path(made["filename"]).write_bytes(await picture.read())
                        print(f"saved {made['filename']}", flush=True)
            elif kind in ("execution_success", "execution_interrupted"):
                return


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", type=Path, help="an API prompt, such as examples/api/demo.json")
parser.add_argument("url", nargs="?", default="http://127.0.0.1:8188", help="of the ComfyUI (default %(default)s)")
options = parser.parse_args()
asyncio.run(main(options.file, options.url))
