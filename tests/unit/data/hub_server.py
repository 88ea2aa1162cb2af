"""A Hugging Face hub on this machine: one data set repository over the hub's HTTP interface."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(repository: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve ``folder`` as the data set ``repository``; yields the address, and the list of paths asked for."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    asked: list[str] = []
    api, resolve = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if path.startswith(resolve):
                name = path[len(resolve) :].partition("/")[2]
                if name in files:
                    self._file(files[name])
                else:
                    self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            elif path.startswith(f"{api}/tree/"):
                self._json(_listing(files, path[len(f"{api}/tree/") :].partition("/")[2]))
            elif path.startswith(api):
                siblings = [{"rfilename": name} for name in files]
                about = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                self._json({**about, "downloads": 0, "likes": 0, "disabled": False, "gated": False})
            else:
                self._json({"error": "Repository not found"}, 404, "RepoNotFound")

        do_HEAD = do_GET

        def _file(self, path: Path) -> None:
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self._body(data)

        def _json(self, value: object, status: int = 200, error: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if error is not None:
                self.send_header("X-Error-Code", error)
            self._body(json.dumps(value).encode())

        def _body(self, data: bytes) -> None:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing: the test says what was asked for."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listing(files: dict[str, Path], under: str) -> list[dict[str, object]]:
    inside = {name: path for name, path in files.items() if not under or name.startswith(f"{under}/")}
    folders = sorted({str(Path(name).parent) for name in inside} - {".", under})
    listed: list[dict[str, object]] = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
    for name, path in inside.items():
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        listed.append({"type": "file", "path": name, "size": path.stat().st_size, "oid": oid})
    return listed
