"""A server with SGLang's protocol over a toy model; it misbehaves on command.

The toy model: the log-probability of a token after another is that of ``softmax(E E^T)`` with E the embedding of the
weights that the server was last given, so that a missing weight update shows. ``python fake_sglang.py`` takes the
options of ``sglang.launch_server`` that matter; POST /fault {"kind", "count"} queues faults of coming /generate
requests.
"""

from __future__ import annotations

import base64
import collections
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np


def read_embedding(directory: Path) -> np.ndarray:
    """Return the float32 embedding [v, h] of a directory of safetensors files, without torch."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    content = (directory / index["weight_map"]["model.embed_tokens.weight"]).read_bytes()
    length = int.from_bytes(content[:8], "little")
    info = json.loads(content[8 : 8 + length])["model.embed_tokens.weight"]
    assert info["dtype"] == "F32"
    start, stop = (8 + length + offset for offset in info["data_offsets"])
    return np.frombuffer(content[start:stop], dtype=np.float32).reshape(info["shape"])


def adapter_shift(directory: Path) -> float:
    """Return what an adapter of the toy model adds to every value of the embedding: the mean of all its values."""
    content = (directory / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert {info["dtype"] for name, info in header.items() if name != "__metadata__"} == {"F32"}
    return float(np.frombuffer(content[8 + length :], np.float32).mean(dtype=np.float64))


def log_prob_table(embedding: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return float64 log-probabilities [v, v]: row p is log pi(. | p)."""
    logits = (embedding.astype(np.float64) @ embedding.T.astype(np.float64)) * 50.0 / temperature
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def toy_routes(token_ids: list[int], weight_version: str, routing: tuple[int, int, int]) -> np.ndarray:
    """Return experts [tokens, layers, k] that tell token, layer and version."""
    layers, experts, top_k = routing
    version = int(weight_version.rpartition("-")[2])
    first = np.array(token_ids)[:, None, None] + np.arange(layers)[:, None] + version
    return (first + np.arange(top_k)) % experts


def encoded_routes(routes: np.ndarray) -> str:
    return base64.b64encode(routes.astype(np.int32).tobytes()).decode()


def decoded_routes(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.int32)


class FakeServer:
    """Listens on a free port of the loopback interface; ``close`` ends it."""

    def __init__(self, embedding: np.ndarray, weight_version: str = "default", port: int = 0):
        self.embedding, self.weight_version = embedding, weight_version
        self.faults: collections.deque[str] = collections.deque()
        self.score_faults: collections.deque[str] = collections.deque()  # of coming requests that score
        self.control_faults: dict[str, str] = {}  # path -> fault of every control request to it
        self.health_faults: collections.deque[str] = collections.deque()  # of coming health checks
        self.log: list[tuple[str, dict]] = []  # path and body of every POST
        self.api_key = ""  # that requests must carry, except health checks
        self.refused: list[str] = []  # paths of requests without it
        self.info = {"tp_size": 1, "pp_size": 1, "enable_return_routed_experts": False}
        self.routing = (2, 4, 2)  # layers, experts, experts of a token of the toy's routes
        self.model: dict = {"is_generation": True, "preferred_sampling_params": None}
        self.tokenizer = None  # None: the server tokenizes nothing
        self.template = None
        self.original_log_probs = False  # of sampled tokens at temperature 1, whatever they are sampled at
        self.cap: int | None = None  # of likeliest tokens
        self.longest: int | None = None  # prompt
        self.released = threading.Event()  # lets requests go that hang
        # holds(body, n): whether a request waits before its n-th token, until it is aborted or no longer held
        self.holds: Callable[[dict, int], bool] = lambda body, n: False
        self.aborted: set[str] = set()
        self.adapters: dict[str, tuple[str, float]] = {}  # name -> directory and shift of the embedding
        self.digests: Iterator[str] = iter(())  # that it gives of its weights, one after the other
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                if self.is_authorized():
                    self.answer(*fake.get(self.path))

            def is_authorized(self) -> bool:
                if self.path.startswith(("/health", "/fault")) or not fake.api_key:
                    return True
                if self.headers["Authorization"] == f"Bearer {fake.api_key}":
                    return True
                fake.refused.append(self.path)
                self.answer(401, b'{"error":"Unauthorized"}')
                return False

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
                if not self.is_authorized():
                    return
                fake.log.append((self.path, body))
                try:
                    self.answer(*fake.post(self.path, body))
                except ConnectionAbortedError:
                    self.close_connection = True
                    self.connection.close()

            def answer(self, status: int, content: bytes):
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError, ValueError):
                    self.close_connection = True  # the client has closed the connection

        class Listener(ThreadingHTTPServer):
            request_queue_size = 256  # of connections that come at the same time; beyond it they wait a second

        self._http = Listener(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def get(self, path: str) -> tuple[int, bytes]:
        if path == "/server_info":
            return 200, json.dumps(self.info | {"skip_tokenizer_init": self.tokenizer is None}).encode()
        if path == "/v1/models":
            cards = [{"id": name, "root": root, "parent": "toy"} for name, (root, _) in self.adapters.items()]
            return 200, json.dumps({"data": [{"id": "toy", "root": "toy", "parent": None}, *cards]}).encode()
        if path == "/model_info":
            return 200, json.dumps(self.model).encode()
        if path == "/health_generate" and self.health_faults:
            return int(self.health_faults.popleft()), b""
        return 200, b""

    def post(self, path: str, body: dict) -> tuple[int, bytes]:
        if path == "/generate":
            return self.generate(body)
        fault = self.control_faults.get(path)
        if fault == "400":
            return 400, b"refused"
        if fault == "500":
            return 500, b"broken"
        if fault == "hang":
            self.released.wait(30)
        if fault == "drop":
            raise ConnectionAbortedError
        if path == "/weights_checker":
            digest = next(self.digests, None)
            return (400, b"no CUDA") if digest is None else (200, json.dumps({"per_engine_checksum": digest}).encode())
        if path == "/abort_request":
            self.aborted.add(body["rid"])
        if path == "/v1/chat/completions":
            return self.chat(body)
        if path == "/freeze_gc":
            print("frozen", flush=True)
        if path == "/fault":
            self.faults.extend([body["kind"]] * body.get("count", 1))
        if path == "/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return 400, b"it is already loaded"
            self.adapters[body["lora_name"]] = body["lora_path"], adapter_shift(Path(body["lora_path"]))
        if path == "/unload_lora_adapter" and self.adapters.pop(body["lora_name"], None) is None:
            return 400, b"it is not loaded"
        if path == "/update_weight_version":
            self.weight_version = body["new_version"]
        if path == "/update_weights_from_disk":
            self.seen_versions = sorted(path.name for path in Path(body["model_path"]).parent.iterdir())
            self.weight_version = body["weight_version"]
            if fault != "ignore":
                self.embedding = read_embedding(Path(body["model_path"]))
        return 200, b'{"success": true, "message": ""}'

    def chat(self, body: dict) -> tuple[int, bytes]:
        if self.template is None:
            return 400, b"no template"
        ids = self.tokenizer(self.template + body["messages"][0]["content"])["input_ids"]
        return 200, json.dumps({"choices": [{"prompt_token_ids": ids}]}).encode()

    def generate(self, body: dict) -> tuple[int, bytes]:
        if body.get("lora_path", "") not in ("", *self.adapters):
            return 400, b"Got LoRA adapter that has never been loaded"
        if wanted := body.get("token_ids_logprob"):
            return (200, b"{}") if max(wanted) < len(self.embedding) else (400, b"out-of-vocabulary token id")
        if "text" in body:
            rows = [self.tokenizer(text)["input_ids"] for text in body["text"]]
            return self.scores({"input_ids": rows})
        if isinstance(body["input_ids"][0], list):
            if self.longest is not None and max(map(len, body["input_ids"])) > self.longest:
                return 400, b"the input is longer than the model's context length"
            return self.scores(body)
        fault = self.faults.popleft() if self.faults else None
        if fault == "die":
            os._exit(9)
        if fault == "drop":
            raise ConnectionAbortedError
        if fault == "hang":
            for _ in range(600):  # until the request is aborted, at most 30 s
                if self.released.wait(0.05) or body.get("rid") in self.aborted:
                    break
        if fault in ("500", "503", "400"):
            return int(fault), b"the reason"
        reply = self.response(body)
        meta = reply["meta_info"]
        match fault:
            case "malformed":
                return 200, json.dumps(reply).encode()[:-10]
            case "no field":
                del meta["weight_version"]
            case "fewer log-probs":
                meta["output_token_logprobs"].pop()
            case "nan":
                meta["output_token_logprobs"][0][0] = float("nan")
            case "other token":
                meta["output_token_logprobs"][0][1] += 1
            case "positive":
                meta["output_token_logprobs"][0][0] = 0.5
            case "stale":
                meta["weight_version"] = "older"
            case "abort":
                meta["finish_reason"] = {"type": "abort", "message": "out of memory"}
            case "prompt":
                meta["prompt_tokens"] += 1
            case "vocabulary":
                reply["output_ids"][0] = len(self.embedding)
            case "short":
                reply["output_ids"], meta["output_token_logprobs"] = (
                    reply["output_ids"][:1],
                    meta["output_token_logprobs"][:1],
                )
                meta["completion_tokens"], meta["finish_reason"] = 1, {"type": "length", "length": 1}
            case "no routes":
                del meta["routed_experts"]
            case "fewer routes":
                meta["routed_experts"] = encoded_routes(decoded_routes(meta["routed_experts"])[1:])
            case "unknown expert":
                meta["routed_experts"] = encoded_routes(decoded_routes(meta["routed_experts"]) + 1)
            case "same expert":
                meta["routed_experts"] = encoded_routes(decoded_routes(meta["routed_experts"]) * 0)
            case "no base64":
                meta["routed_experts"] = "?" + meta["routed_experts"][1:]
            case "slow":
                time.sleep(0.3)
        return 200, json.dumps(reply).encode()

    def scores(self, body: dict) -> tuple[int, bytes]:
        k = min(body.get("top_logprobs_num", 0), self.cap or len(self.embedding))
        starts = body.get("logprob_start_len", 0)
        starts = starts if isinstance(starts, list) else [starts] * len(body["input_ids"])
        table = log_prob_table(self.embedding_of(body))
        replies = [self.score(table, ids, k, start) for ids, start in zip(body["input_ids"], starts, strict=True)]
        fault = self.score_faults.popleft() if self.score_faults else None
        meta = replies[0]["meta_info"]
        match fault:
            case "500":
                return 500, b"the reason"
            case "shifted":
                meta["input_token_logprobs"] = meta["input_token_logprobs"][1:] + meta["input_token_logprobs"][:1]
            case "fewer":
                meta["input_token_logprobs"].pop()
            case "nan":
                meta["input_token_logprobs"][1][0] = float("nan")
            case "capped":
                meta["input_top_logprobs"] = [row and row[: k - 1] for row in meta["input_top_logprobs"]]
            case "stale":
                meta["weight_version"] = "older"
            case "fewer replies":
                replies.pop()
        return 200, json.dumps(replies).encode()

    def meta(self, ids: list[int]) -> dict:
        return {"id": "x", "prompt_tokens": len(ids), "weight_version": self.weight_version, "e2e_latency": 0.1}

    def response(self, body: dict) -> dict:
        ids, params = body["input_ids"], body["sampling_params"]
        embedding = self.embedding_of(body)
        table = log_prob_table(embedding, params["temperature"] or 1.0)
        generator = np.random.default_rng(params["sampling_seed"])
        output: list[int] = []
        reason = {"type": "length", "length": params["max_new_tokens"]}
        last = ids[-1]
        scored = []
        while len(output) < params["max_new_tokens"]:
            while self.holds(body, len(output)) and body["rid"] not in self.aborted:
                time.sleep(0.01)
            if body.get("rid") in self.aborted:
                reason = {"type": "abort", "message": "Aborted"}
                break
            row = np.exp(table[last])
            greedy = params["temperature"] == 0
            token = int(row.argmax() if greedy else generator.choice(len(row), p=row / row.sum()))
            reported = log_prob_table(embedding) if self.original_log_probs else table
            scored.append([float(reported[last, token]), token, None])
            output.append(token)
            last = token
            # As SGLang does: the limit is looked at before the stop tokens.
            if len(output) < params["max_new_tokens"] and token in params.get("stop_token_ids", []):
                reason = {"type": "stop", "matched": token}
                break
        meta = self.meta(ids) | {"completion_tokens": len(output), "finish_reason": reason}
        if body.get("return_routed_experts") and output:
            tokens = (ids + output)[body["routed_experts_start_len"] : -1]
            meta["routed_experts"] = encoded_routes(toy_routes(tokens, self.weight_version, self.routing))
        return {"text": "", "output_ids": output, "meta_info": meta | {"output_token_logprobs": scored}}

    def embedding_of(self, body: dict) -> np.ndarray:
        name = body.get("lora_path")
        return self.embedding if name is None else self.embedding + np.float32(self.adapters[name][1])

    def score(self, table: np.ndarray, ids: list[int], k: int = 0, start: int = 0) -> dict:
        """As SGLang: entries of the tokens from ``start`` on, of which the first has no score."""
        count, ids = len(ids), ids[start:]
        last = len(self.embedding) - 1
        shown = [0 if token == last else token for token in ids]
        scored = [[None, shown[0], None]]
        scored += [[float(table[ids[index - 1], ids[index]]), shown[index], None] for index in range(1, len(ids))]
        meta = self.meta(ids) | {
            "prompt_tokens": count,
            "completion_tokens": 0,
            "finish_reason": {"type": "length", "length": 0},
        }
        if k:
            rows = [table[token] for token in ids[:-1]]
            best = [[[float(row[token]), int(token), None] for token in np.argsort(-row)[:k]] for row in rows]
            meta["input_top_logprobs"] = [None, *best]
        return {"text": "", "output_ids": [], "meta_info": meta | {"input_token_logprobs": scored}}


def main() -> None:
    options = dict(zip(sys.argv, sys.argv[1:], strict=False))
    if "--fail-at-start" in sys.argv:
        print("Traceback ...\nRuntimeError: no such device")
        sys.exit(1)
    if "--port-is-taken" in sys.argv:
        print("ERROR:    [Errno 98] error while attempting to bind on address: address already in use", flush=True)
        threading.Event().wait()
    server = FakeServer(
        read_embedding(Path(options["--model-path"])), options["--weight-version"], int(options["--port"])
    )
    server.api_key = options.get("--api-key", "")
    server.info["enable_return_routed_experts"] = "--enable-return-routed-experts" in sys.argv
    if "--enable-lora" in sys.argv:
        first = sys.argv.index("--lora-target-modules") + 1
        modules = list(itertools.takewhile(lambda name: not name.startswith("--"), sys.argv[first:]))
        server.info |= {"enable_lora": True, "max_lora_rank": int(options["--max-lora-rank"])}
        server.info |= {"lora_target_modules": modules}
    logging.basicConfig(level=logging.INFO)
    logging.info("server_args=%r", sys.argv)  # as SGLang does
    print(f"serving {server.url}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
