#!/usr/bin/python3
"""A page that answers every path, on the port of the program that it stands in for."""

import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Page(BaseHTTPRequestHandler):
    """200 and one word."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"stand-in")

    def log_message(self, *_: object) -> None:
        pass


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the first process of a container has no default
ThreadingHTTPServer(("0.0.0.0", int(os.environ["PAGE_PORT"])), Page).serve_forever()
