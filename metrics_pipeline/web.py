"""A small HTTP server for machines that look after us: health, status, Prometheus."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from metrics_pipeline.data_folder import HEADER
from metrics_pipeline.errors import BusyError


class WebServer:
    """uvicorn in a thread, on one address only; it leaves signals alone.

    Args:
        routes: what it answers.
        port: where to listen; 0 for any, see `port` after `start`.
        variable: the setting that moves the port, for the message when it is taken.
        host: address to listen on (`LISTEN_HOST`); loopback outside containers.
        identity: of the data folder, with which every answer comes: a port may be another stack's.
    """

    def __init__(
        self, routes: Sequence[Route], port: int, variable: str, host: str = "127.0.0.1", identity: str = ""
    ) -> None:
        self.port = port
        self._host = host
        self._variable = variable
        self._server = uvicorn.Server(
            uvicorn.Config(
                Starlette(routes=list(routes)),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                loop="asyncio",
                timeout_graceful_shutdown=1,
                headers=[(HEADER, identity)] if identity else [],
            )
        )
        self._socket: socket.socket | None = None
        # Not in the main thread, so uvicorn installs no signal handlers.
        self._thread = threading.Thread(target=self._serve, name="web", daemon=True)

    def start(self) -> None:
        """Take the port and answer.

        Raises:
            BusyError: the port is taken.
        """
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self.port))
        except OSError as error:
            listener.close()
            why = "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
            raise BusyError(f"port {self.port} {why}: free it, or set {self._variable} to another one") from error
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._socket = listener
        self._thread.start()

    def stop(self) -> None:
        """Give the port back."""
        if self._socket is None:
            return
        self._server.should_exit = True
        self._thread.join(3)
        self._socket.close()
        self._socket = None

    def _serve(self) -> None:
        assert self._socket is not None  # noqa: S101  # `start` sets it before it starts this thread
        self._server.run(sockets=[self._socket])
