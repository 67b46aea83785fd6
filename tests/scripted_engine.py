"""An engine that says what a test tells it to, where no real one can be brought to say it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class ScriptedEngine:
    """Answers on a loopback port as its attributes say, from one request to the next."""

    def __init__(self) -> None:
        self.health = 200
        self.running = self.waiting = self.decodes = 0
        self.metrics = 200
        self.completions = 0
        self.props: dict[str, Any] = {
            "model_path": "/app/models/tiny.gguf",
            "default_generation_settings": {"n_ctx": 8192},
            "total_slots": 4,
            "build_info": "b11312-0c1e57098bba43ac29e6e3b677cdceebdd22334f",
        }
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, text = {
                    "/health": (engine.health, "{}"),
                    "/props": (200, json.dumps(engine.props)),
                    "/metrics": (engine.metrics, engine.series()),
                }[self.path]
                self._answer(status, text)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                engine.completions += 1
                self._answer(500, '{"error": {"code": 500, "message": "Compute error."}}')

            def _answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def series(self) -> str:
        """Write the counters as the engine does."""
        figures = {
            "requests_processing": self.running,
            "requests_deferred": self.waiting,
            "n_decode_total": self.decodes,
        }
        return "".join(f"# HELP\nllamacpp:{name} {value}\n" for name, value in figures.items())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
