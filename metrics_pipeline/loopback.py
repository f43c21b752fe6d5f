"""HTTP sessions and gRPC channels, made in one place: what is on this machine is never asked through a proxy.

Anything else is, when the environment says so (`http_proxy`, `https_proxy`, `all_proxy`, and `no_proxy` for exceptions).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import requests

from metrics_pipeline.surroundings import is_beside_us

if TYPE_CHECKING:
    import grpc


def session(url: str) -> requests.Session:
    """A session for one service.

    Args:
        url: where it is. On this machine, nothing of the environment counts: no proxy, no `.netrc`.
    """
    made = requests.Session()
    made.trust_env = not is_beside_us(url)
    return made


def get(url: str, timeout: float) -> requests.Response:
    """Ask once.

    Args:
        url: what to ask.
        timeout: seconds to wait for the connection, and for each part of the answer.

    Raises:
        requests.RequestException: there was no answer.
    """
    with session(url) as asked:
        return asked.get(url, timeout=timeout)


def channel(address: str) -> grpc.Channel:
    """A gRPC channel to a server on this machine.

    Args:
        address: host:port.
    """
    import grpc  # heavy, and most commands have no use for it

    return grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
