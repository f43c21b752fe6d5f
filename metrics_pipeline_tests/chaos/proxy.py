"""A TCP proxy before PostgreSQL that cuts the line around a COMMIT, or lets nothing through any more without cutting it."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from typing import Final

_COMMIT: Final = b"Q\0\0\0\x0bCOMMIT\0"
_COPY: Final = b"COPY "
_PIECE: Final = 1 << 16


class Proxy:
    """Listens on a port of its own; only commits of transactions that copied are touched.

    Args:
        target: PostgreSQL's port on this machine.
        chance: of being cut, for a commit.

    Attributes:
        cutting: whether it does.
        swallowing: whether there is a line on which nothing comes through any more.
        before: lines cut before the COMMIT reached PostgreSQL.
        after: lines cut when PostgreSQL had answered it.
    """

    def __init__(self, target: int, chance: float = 0.3) -> None:
        self._target = target
        self._chance = chance
        self._random = random.Random(4)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cutting = True
        self.swallowing = False
        self._swallow_next = False
        self.before = self.after = 0
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def swallow_next(self) -> None:
        """Cut no more; the next line on which such a COMMIT comes stays open, and nothing comes through any more."""
        self.cutting, self._swallow_next = False, True

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with suppress(OSError):
                server = socket.create_connection(("127.0.0.1", self._target))
                # Set while the server's words are kept from the client.
                deaf = threading.Event()
                for body, name in ((self._ask, "asks"), (self._answer, "answers")):
                    threading.Thread(target=body, args=(client, server, deaf), name=name, daemon=True).start()
                continue
            client.close()

    def _ask(self, client: socket.socket, server: socket.socket, deaf: threading.Event) -> None:
        copied, tail = False, b""
        with suppress(OSError):
            while piece := client.recv(_PIECE):
                seen = tail + piece
                copied = copied or _COPY in seen
                if seen.endswith(_COMMIT):
                    cut = copied and self.cutting and self._random.random() < self._chance
                    if copied and self._swallow_next:
                        self._swallow_next, self.swallowing = False, True
                        while client.recv(_PIECE):
                            pass  # until the client is gone; PostgreSQL does not learn of it
                        return
                    copied, seen = False, b""
                    if cut and self._random.random() < 0.5:
                        self.before += 1
                        break
                    if cut:
                        deaf.set()
                server.sendall(piece)
                tail = seen[-len(_COMMIT) :]
        _hang_up(client, server)

    def _answer(self, client: socket.socket, server: socket.socket, deaf: threading.Event) -> None:
        with suppress(OSError):
            while piece := server.recv(_PIECE):
                if deaf.is_set():
                    self.after += 1
                    break
                client.sendall(piece)
        _hang_up(client, server)


def _hang_up(*lines: socket.socket) -> None:
    for line in lines:
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
        line.close()
