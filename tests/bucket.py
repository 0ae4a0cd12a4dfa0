"""A bucket in this process: `gs://` for Python (fsspec, as etils' epath uses it) and for TensorStore (HTTP), one store.

It has what a real one has not: no folders, no append, no rename. Objects are replaced whole.
"""

import contextlib
import http.server
import io
import json
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator
from typing import Any

import fsspec
import google.cloud
import pytest
from fsspec.spec import AbstractFileSystem


class Objects:
    """Name ("bucket/path") -> bytes. `read_only`: writing fails as it does without permission."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: dict[str, tuple[bytes, int]] = {}
        self.generation = 0
        self.read_only = False

    def put(self, name: str, data: bytes) -> int:
        if self.read_only:
            raise PermissionError(13, "403: the caller does not have storage.objects.create access", name)
        with self.lock:
            self.generation += 1
            self.held[name] = (bytes(data), self.generation)
            return self.generation

    def get(self, name: str) -> bytes:
        try:
            return self.held[name][0]
        except KeyError:
            raise FileNotFoundError(2, "No such object", name) from None

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.held if name.startswith(prefix))


class _Writer(io.BytesIO):
    """The object appears, whole, when the file is closed; not at all if an error closes it."""

    def __init__(self, objects: Objects, name: str):
        super().__init__()
        self.objects, self.name = objects, name

    def seek(self, *_: Any) -> int:
        raise OSError("Seek only available in read mode")

    def seekable(self) -> bool:
        return False

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            super().close()

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self.objects.put(self.name, data)


class FileSystem(AbstractFileSystem):
    """What gcsfs offers, over `Objects`."""

    protocol = ("gs", "gcs")
    cachable = False
    objects = Objects()

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found: dict[str, Any] = {}
        for name in self.objects.names(f"{path}/"):
            child = f"{path}/{name[len(path) + 1 :].split('/')[0]}"
            leaf = child == name
            size = len(self.objects.get(name)) if leaf else 0
            found[child] = {"name": child, "size": size, "type": "file" if leaf else "directory"}
        if not found and path in self.objects.held:
            found[path] = {"name": path, "size": len(self.objects.get(path)), "type": "file"}
        if not found and "/" in path:
            raise FileNotFoundError(2, "No such object", path)
        return list(found.values()) if detail else list(found)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.objects.held:
            return {"name": path, "size": len(self.objects.get(path)), "type": "file"}
        if "/" in path and not self.objects.names(f"{path}/"):
            raise FileNotFoundError(2, "No such object", path)
        return {"name": path, "size": 0, "type": "directory"}

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        path = self._strip_protocol(path)
        if mode == "rb":
            return io.BytesIO(self.objects.get(path))
        if mode == "wb":
            return _Writer(self.objects, path)
        raise NotImplementedError(f"a bucket has no file mode {mode}")

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        if self.isfile(path1):
            self.objects.put(self._strip_protocol(path2), self.objects.get(self._strip_protocol(path1)))

    def rm_file(self, path: str) -> None:
        with self.objects.lock:
            self.objects.held.pop(self._strip_protocol(path), None)

    def _rm(self, path: str) -> None:
        self.rm_file(path)

    def rmdir(self, path: str) -> None:
        """There is none."""

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """There is none."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There is none."""


class _Http(http.server.BaseHTTPRequestHandler):
    """The part of the JSON API of Cloud Storage that TensorStore speaks."""

    protocol_version = "HTTP/1.1"
    objects: Objects

    def _object(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        bucket, _, name = url.path.split("/b/", 1)[1].partition("/o")
        return f"{bucket}/{urllib.parse.unquote(name.lstrip('/') or query.get('name', ''))}", query

    def _answer(self, code: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _allowed(self, name: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self.objects.held.get(name, (b"", 0))[1]

    def do_GET(self) -> None:
        name, query = self._object()
        if name.endswith("/"):
            return self._list(name, query)
        if name not in self.objects.held:
            return self._answer(404)
        data, generation = self.objects.held[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("alt") != "media":
            found = {"name": name, "generation": str(generation), "size": str(len(data))}
            return self._answer(200, json.dumps(found).encode())
        headers = {"x_goog_generation": generation, "Content_Type": "application/octet-stream"}
        span = self.headers.get("Range")
        if span is None:
            return self._answer(200, data, **headers)
        first, _, last = span.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(data) - int(last)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        return self._answer(
            206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **headers
        )

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        names = self.objects.names(bucket + query.get("prefix", ""))
        items = [{"name": name.removeprefix(bucket), "size": "1"} for name in names]
        self._answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        name, query = self._object()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._allowed(name, query):
            return self._answer(412)
        try:
            generation = self.objects.put(name, data)
        except PermissionError as error:
            return self._answer(403, str(error).encode())
        found = {"name": name, "generation": str(generation), "size": str(len(data))}
        return self._answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def do_DELETE(self) -> None:
        name, query = self._object()
        if not self._allowed(name, query):
            return self._answer(412)
        with self.objects.lock:
            gone = self.objects.held.pop(name, None)
        return self._answer(204 if gone else 404)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


class _Client:
    """Of google-cloud-storage, which orbax asks whether a bucket has folders."""

    def get_bucket(self, name: str) -> Any:
        return types.SimpleNamespace(name=name, hierarchical_namespace_enabled=False)


@contextlib.contextmanager
def bucket() -> Iterator[Objects]:
    """Inside, `gs://` is an empty bucket of any name."""
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = _Client  # type: ignore[attr-defined]
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, storage.__name__, storage)
    # Where the real one was imported before, it is found as an attribute of its package.
    patch.setattr(google.cloud, "storage", storage, raising=False)
    FileSystem.objects = objects = Objects()
    fsspec.register_implementation("gs", FileSystem, clobber=True)
    fsspec.register_implementation("gcs", FileSystem, clobber=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Http", (_Http,), {"objects": objects}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_address[1]}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "abc")
    try:
        yield objects
    finally:
        server.shutdown()
        server.server_close()
        patch.undo()
