"""A Hugging Face Hub on this machine: models in folders, with what huggingface_hub asks for, and failures on request."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`with Hub(folder) as hub:` serves folder/OWNER/NAME/*. fail: paths (their ends) -> what happens: "500", "cut", each once.

    asked: every request's path. made: what was created (name -> private). sent: name -> {file: bytes}.
    """

    def __init__(self, folder: Path):
        self.folder, self.fail = folder, dict[str, str]()
        self.asked, self.made, self.sent = list[str](), dict[str, bool](), dict[str, dict[str, bytes]]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._get(body=False)

            def do_GET(self) -> None:
                self._get(body=True)

            def _get(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                    return self._model(*found.groups())
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", path):
                    files = hub.files(found[1])
                    return self._json([{"type": "file", "path": n, "size": len(d), "oid": _sha1(d)} for n, d in files.items()])
                if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    return self._file(found[1], found[3], body)
                return self._missing("EntryNotFound")

            def _model(self, name: str, revision: str | None) -> None:
                if not (hub.folder / name).is_dir():
                    return self._missing("RepoNotFound")
                if revision not in (None, "main", COMMIT):
                    return self._missing("RevisionNotFound")
                siblings = [{"rfilename": file} for file in hub.files(name)]
                return self._json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False})

            def _file(self, name: str, file: str, body: bool) -> None:
                data = hub.files(name).get(file)
                if data is None:
                    return self._missing("EntryNotFound")
                how = hub.fail.pop(file, None) if body else None
                if how == "500":
                    return self._json({"error": "broken"}, 500)
                first = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
                self.send_response(206 if first else 200)
                self.send_header("ETag", f'"{_sha1(data)}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data) - first))
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                if body:
                    self.wfile.write(data[first : first + (len(data) - first) // 2] if how == "cut" else data[first:])
                    if how == "cut":
                        self.close_connection = True
                return None

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "Content-Length" in self.headers else self._chunks()
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                if path == "/api/repos/create":
                    asked = json.loads(raw)
                    name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                    hub.made[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
                    return self._json({"url": f"{hub.url}/{name}", "name": name, "id": "1"})
                if path == "/api/validate-yaml":
                    return self._json({"errors": [], "warnings": []})
                if path.endswith("/preupload/main"):
                    files = json.loads(raw)["files"]
                    return self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                    lines = [json.loads(line) for line in raw.splitlines() if line.strip()]
                    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
                    hub.sent[found[1]] = files
                    return self._json({"success": True, "commitUrl": f"{hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
                return self._missing("EntryNotFound")

            def _chunks(self) -> bytes:
                parts = []
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _missing(self, code: str) -> None:
                return self._json({"error": code}, 404, {"X-Error-Code": code})

            def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                for name, content in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, content)
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def files(self, name: str) -> dict[str, bytes]:
        folder = self.folder / name
        return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}

    def environment(self, home: Path) -> dict[str, str]:
        """For a command that is to use this Hub alone."""
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret", "HF_HUB_ETAG_TIMEOUT": "3", **quiet}

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
