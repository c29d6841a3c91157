"""A bucket on this host: what of S3 a download needs, over a folder, with faults on demand."""

import http.server
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote


class Bucket(http.server.ThreadingHTTPServer):
    """Serves `/NAME/KEY` from the folder `root/KEY`. Faults are by file name."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.gets: Counter[str] = Counter()
        self.cuts: Counter[str] = Counter()
        """So many answers break off in the middle."""
        self.flips: Counter[str] = Counter()
        """So many answers have a wrong byte."""
        self.stalls: dict[str, float] = {}
        """Seconds before the body of each answer."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Bucket

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *words: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        name = Path(unquote(self.path)).name
        key = unquote(self.path).split("?")[0].strip("/").partition("/")[2]
        file = self.server.root / key
        if not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if not with_body:
            return
        self.server.gets[name] += 1
        time.sleep(self.server.stalls.get(name, 0.0))
        if self.server.cuts[name] > 0:
            self.server.cuts[name] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        if self.server.flips[name] > 0:
            self.server.flips[name] -= 1
            body = body[:-3] + bytes([body[-3] ^ 4]) + body[-2:]
        self.wfile.write(body)
