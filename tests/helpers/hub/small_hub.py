"""A Hub of a few datasets on a loopback port: just what `datasets` asks for when it streams files."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlparse

REVISION = "a" * 40
Repositories = dict[str, dict[str, bytes | None]]  # name → path → contents (None: listed, but not to be had)


@contextmanager
def serve(repositories: Repositories) -> Iterator[str]:
    """Serve the datasets and give the endpoint's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlparse(self.path)
            found = re.match(
                r"(/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/[^/]+)?/?(.*)",
                unquote(url.path),
            )
            files = repositories.get(found[2]) if found else None
            if not found or files is None:
                self.reply(404, b"{}", X_Error_Code="RepoNotFound")
            elif found[3] == "resolve":
                self.file(files.get(found[4]))
            elif found[3] == "tree":
                listed = tree(files, found[4], "recursive=true" in url.query.lower())
                if listed:
                    self.reply(200, json.dumps(listed).encode())
                else:
                    self.reply(404, b"{}", X_Error_Code="EntryNotFound")
            elif found[3] == "paths-info":
                asked = {path.strip("/") for path in parse_qs(body.decode())["paths"]}
                listed = [entry for entry in tree(files, "", True) if entry["path"] in asked]
                self.reply(200, json.dumps(listed).encode())
            else:
                siblings = [{"rfilename": path} for path in files]
                facts = {"_id": "1", "id": found[2], "sha": REVISION, "siblings": siblings, "tags": []}
                self.reply(200, json.dumps(facts).encode())

        def file(self, contents: bytes | None) -> None:
            if contents is None:
                self.reply(404, b"", X_Error_Code="EntryNotFound")
                return
            facts = {"ETag": '"b"', "X_Repo_Commit": REVISION, "Accept_Ranges": "bytes"}
            wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted:
                first = int(wanted[1])
                part = contents[first : int(wanted[2] or len(contents)) + 1]
                facts["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(contents)}"
                self.reply(206, part, **facts)
            else:
                self.reply(200, contents, **facts)

        do_GET = do_HEAD = do_POST = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tree(files: dict[str, bytes | None], folder: str, recursive: bool) -> list[dict[str, object]]:
    """Entries below a folder, as the Hub lists them."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    entries: dict[str, dict[str, object]] = {}
    for path, contents in files.items():
        parts = path.removeprefix(prefix).split("/") if path.startswith(prefix) else []
        for depth in range(1, len(parts) + 1 if recursive else min(len(parts), 1) + 1):
            at = prefix + "/".join(parts[:depth])
            kind = "file" if depth == len(parts) else "directory"
            entries[at] = {"type": kind, "path": at, "oid": "c" * 40, "size": len(contents or b"x")}
    return list(entries.values())
