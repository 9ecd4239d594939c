"""A server that keeps the contract of /v1/completions with echo and log-probs, as vLLM serves them, with a real model.

Transformers computes: the program's own forward is what the tests compare with it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class TeacherModel:
    """A model folder by transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> list[float]:
        """Of each token behind the first."""
        logits = self.model(torch.tensor([tokens])).logits[0, :-1]
        every = torch.log_softmax(logits.double(), -1)
        return every.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()

    def choice(self, index: int, tokens: list[int]) -> dict[str, Any]:
        """One of a server's answers: the prompt, and one token behind it."""
        texts = [self.tokenizer.convert_ids_to_tokens(token) for token in tokens]
        column = [None, *self.log_probs(tokens), -0.5]
        return {"index": index, "text": "", "logprobs": {"tokens": [*texts, "x"], "token_logprobs": column}}


@contextmanager
def teacher_server(
    folder: Path, *, faults: list[str] | None = None, port: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Base URL, and the completions that were asked for. `faults`: what becomes of the first requests: `500`, `silent`
    (no answer for a second), `short`, `nan`, `text` (no JSON), or `` (a right answer). `port`: 0 takes a free one."""
    model, waiting, asked = TeacherModel(folder), list(faults or []), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, json.dumps({"data": [{"id": "big"}]}))

        def do_POST(self) -> None:
            values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = waiting.pop(0) if waiting else ""
            if fault == "500":
                self._answer(500, "out of memory")
                return
            if fault == "silent":
                time.sleep(1.0)
            asked.append(values)
            assert (values["model"], values["echo"], values["logprobs"]) == ("big", True, 0)
            choices = [model.choice(i, tokens) for i, tokens in enumerate(values["prompt"])]
            if fault == "short":
                choices[0]["logprobs"]["token_logprobs"] = [None]
            if fault == "nan":
                choices[0]["logprobs"]["token_logprobs"][1] = float("nan")
            # in another order than asked, as the protocol allows
            self._answer(200, "<html>" if fault == "text" else json.dumps({"choices": choices[::-1]}))

        def _answer(self, code: int, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):  # the client may wait no longer
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
