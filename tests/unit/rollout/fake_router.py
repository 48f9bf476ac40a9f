"""Takes the place of ``sglang_router.launch_router``: hands requests to its workers in turn, and ends on command.

GET, POST and DELETE /workers as in sglang-router 0.3.2; POST /fault {"die_after": n} ends it in the n-th request.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

workers: dict[str, str] = {}  # id -> address
turns = itertools.count()
lives = [-1]  # requests until the end; negative: for ever
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        servers = [{"id": key, "url": url} for key, url in list(workers.items())]
        self.answer(200, json.dumps({"workers": servers}).encode())

    def do_DELETE(self):
        del workers[self.path.rpartition("/")[2]]
        self.answer(202, b"{}")

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/workers":
            workers[f"worker-{next(turns)}"] = json.loads(content)["url"]
            self.answer(202, b"{}")
        elif self.path == "/fault":
            lives[0] = json.loads(content)["die_after"]
            self.answer(200, b"{}")
        else:
            self.pass_on(content)

    def pass_on(self, content: bytes) -> None:
        with lock:
            lives[0] -= 1
            if lives[0] == 0:
                os._exit(9)
        urls = list(workers.values())
        to = http.client.HTTPConnection(urlsplit(urls[next(turns) % len(urls)]).netloc)
        headers = {"Content-Type": "application/json", "Authorization": self.headers["Authorization"] or ""}
        to.request("POST", self.path, content, headers)
        reply = to.getresponse()
        self.answer(reply.status, reply.read())
        to.close()


class Listener(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


if __name__ == "__main__":
    options = dict(zip(sys.argv, sys.argv[1:], strict=False))
    Listener((options["--host"], int(options["--port"])), Handler).serve_forever()
