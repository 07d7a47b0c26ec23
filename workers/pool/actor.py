"""The Ray actor of one worker: sets its environment, then hands itself over to the runner.

Nothing of torch or ComfyUI may be imported at module level: both read the environment when they are.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
import time
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from ..wire.messages import WorkerPlace

EXIT_DRIVER_GONE = 3


class Worker:
    """One rank. `start` and `serve` run in the main group, `status` beside them in the control group.

    Requests do not come as actor calls but over the connection that `serve` opens to the driver: two
    calls of an actor cost over a millisecond, two messages a tenth of it.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._runner: Any = None
        self._follows = False

    def start(self, environment: bytes, comfy_root: str, variables: dict[str, str]) -> WorkerPlace:
        """Set the process up and import what the work needs. Runs on all ranks at once.

        `environment` is a pickled HostEnvironment: bytes, since unpickling one imports torch.
        """
        begun = time.monotonic()
        os.environ.update(variables)
        self._choose_interface(ray.util.get_node_ip_address())
        # the folder that Ray was started from may hold anything, and is on the path where PYTHONPATH has an empty entry
        sys.path[:] = [comfy_root, *(entry for entry in sys.path if entry not in ("", os.getcwd()))]
        node = ray.get_runtime_context().get_node_id()
        gc.disable()  # thousands of new objects that live for ever: collecting costs a tenth of the imports
        try:
            from ..wire.comfy_host import apply

            apply(pickle.loads(environment))
            from comfy import model_management

            from ..worker import runner, serve  # noqa: F401
        finally:
            gc.enable()
            gc.freeze()
        from ..wire.messages import WorkerPlace

        return WorkerPlace(
            rank=self._rank,
            pid=os.getpid(),
            node=node,
            host=ray.util.get_node_ip_address(),
            device=str(model_management.get_torch_device()),
            device_name=str(model_management.get_torch_device_name(model_management.get_torch_device())),
            start_seconds=time.monotonic() - begun,
        )

    def _choose_interface(self, address: str) -> None:
        """Have gloo and NCCL use the interface by which Ray's nodes reach each other; on their own they may not."""
        import psutil

        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address == address for entry in addresses) and not address.startswith("127."):
                for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                    os.environ.setdefault(variable, name)

    def follow(self, driver_pid: int) -> None:
        """End this process as soon as the driver's ends. Only for a driver on the same host.

        Ray takes seconds to notice; a worker in a collective would not notice its closed connection.
        """
        if self._follows or not hasattr(os, "pidfd_open"):
            return
        self._follows = True

        def follow() -> None:
            try:
                descriptor = os.pidfd_open(driver_pid)
            except ProcessLookupError:
                os._exit(EXIT_DRIVER_GONE)
            wait([descriptor])
            os._exit(EXIT_DRIVER_GONE)

        threading.Thread(target=follow, name="raylight-follow-driver", daemon=True).start()

    def serve(self, address: Any, key: bytes) -> None:
        """Answer a pool's requests until it hangs up. What was held for it is given up then: another may follow."""
        from multiprocessing.connection import Client

        from ..worker import memory
        from ..worker.runner import Runner
        from ..worker.serve import serve

        self._runner = Runner()
        connection = Client(address, authkey=key)
        connection.send_bytes(pickle.dumps(self._rank))
        serve(connection, self._runner)
        connection.close()
        self._runner = None
        gc.collect()
        memory.give_back()

    @ray.method(concurrency_group="control")
    def status(self) -> Any:
        """Sign of life: answered while the main group works. Returns the Standing, None while it serves no pool."""
        runner = self._runner
        return runner.standing() if runner is not None else None
