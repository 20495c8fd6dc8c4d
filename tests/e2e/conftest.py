"""A whole pool for the tests of a module, and a web server of a member's."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lab.pool import LabPool


@pytest.fixture(scope="module")
def pool(tmp_path_factory, slow_packets):
    """CA, zone, resolver and registry; each test adds the members it needs, whose agents answer by both engines in turn."""
    with LabPool(tmp_path_factory.mktemp("pool"), addresses=12, opening_size=1, knot=True) as running:
        yield running


@contextmanager
def _web_server(address, port, path, content):
    """Any web server of the member's, which has one file."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == path
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer((address, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web_server():
    """`web_server(address, port, path, content)`: a server for a block of code."""
    return _web_server
