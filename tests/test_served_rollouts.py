"""The engine behind an address, against a server of our own that speaks as vLLM does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_model, tiny_config

from minillm import remote
from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Sampling, SpecialIds
from minillm.families.diffusion import Diffusion
from minillm.families.settings import FamilyConfig
from minillm.log import UserError
from minillm.models.transformer import LanguageModel
from minillm.rollout.engine import ModelEngine
from minillm.rollout.openai import ServedEngine
from minillm.rollout.settings import RolloutSettings, open_engine
from minillm.text.tokenizer import Tokenizer

AR = Autoregressive()
TOKENIZER = Tokenizer.load()
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size)
PROMPTS = [[1, 2, 3], [9, 8], [300, 5, 6]]
STOPS = (TOKENIZER.end_of_text_id, TOKENIZER.end_of_turn_id)
SAMPLING = Sampling(max_new_tokens=6, stop_ids=STOPS, seed=3)


class Stub:
    """A server with the weights of a folder, or of a model; `spoil` changes replies."""

    def __init__(self, model: LanguageModel) -> None:
        self.engine = ModelEngine(AR, model)
        self.requests: list[tuple[str, Any]] = []
        self.spoil: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.statuses: list[int] = []  # answered first, one each
        self.folder: Path | None = None
        self.load: Callable[[Path], Any] = lambda folder: None
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: Any) -> None:
                with stub.lock:
                    stub.requests.append((self.path, body))
                    status = stub.statuses.pop(0) if stub.statuses else 200
                    text = json.dumps(stub.reply(self.path, body)) if status == 200 else "busy, come again"
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that went away
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def reply(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        if path == "/collective_rpc":
            assert body == {"method": "reload_weights"} and self.folder is not None
            weights = self.load(self.folder).state_dict()
            model = LanguageModel(CONFIG)
            model.load_state_dict({k: v for k, v in weights.items() if k != "lm_head.weight"})
            self.engine.update(model.eval())
            return None
        sampling = Sampling(
            max_new_tokens=body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"],
            top_k=body.get("top_k", 0), stop_ids=tuple(body["stop_token_ids"]), seed=body["seed"],
        )  # fmt: skip
        (group,) = self.engine.generate([body["prompt"]], count=body["n"], sampling=sampling)
        choices = [
            {
                "index": index, "text": "",
                "finish_reason": "stop" if each.finished else "length",
                "logprobs": {"tokens": [f"token_id:{t}" for t in each.tokens], "token_logprobs": each.log_probs},
            }
            for index, each in enumerate(group)
        ]  # fmt: skip
        return self.spoil({"choices": choices[::-1]})  # in any order


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stub = Stub(random_model(CONFIG))
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def engine_of(stub: Stub, **flags: Any) -> ServedEngine:
    settings = RolloutSettings(rollout_url=f"{stub.address}/v1", rollout_timeout=20.0, **flags)
    return ServedEngine(settings, TOKENIZER, positions=64)


def test_tokens_and_log_probs_come_as_the_server_wrote_them(stub: Stub) -> None:
    engine = engine_of(stub)
    greedy = replace(SAMPLING, temperature=0.0)
    for sampling in (greedy, replace(greedy, stop_ids=(*STOPS, *range(0, 6400, 3)))):
        ours = sum(stub.engine.generate(PROMPTS, count=2, sampling=sampling), [])
        theirs = sum(engine.generate(PROMPTS, count=2, sampling=sampling), [])
        for here, there in zip(ours, theirs, strict=True):
            assert (there.tokens, there.finished) == (here.tokens, here.finished)
            assert there.log_probs == pytest.approx(here.log_probs, abs=1e-5)
    assert {completion.finished for completion in ours} == {True, False}


def test_the_request_asks_for_what_is_needed(stub: Stub) -> None:
    engine = engine_of(stub)
    engine.generate([[1, 2], [1, 2], [3]], count=2, sampling=replace(SAMPLING, top_k=9, temperature=0.7))
    assert [path for path, _ in stub.requests] == ["/v1/models", *["/v1/completions"] * 3]
    body = next(body for path, body in stub.requests if path == "/v1/completions" and body["prompt"] == [3])
    assert body == {
        "model": "tiny", "prompt": [3], "n": 2, "max_tokens": 6, "temperature": 0.7, "top_p": 1.0, "top_k": 9,
        "seed": body["seed"], "logprobs": 1, "stop_token_ids": list(STOPS), "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    assert len({body["seed"] for path, body in stub.requests if path == "/v1/completions"}) == 3


def test_new_weights_reach_the_server(stub: Stub, tmp_path: Path) -> None:
    stub.folder, stub.load = tmp_path / "served", pytest.importorskip("transformers").Qwen3ForCausalLM.from_pretrained
    engine = engine_of(stub, rollout_folder=str(stub.folder), rollout_reload=f"{stub.address}/collective_rpc")
    other = random_model(CONFIG, seed=1)
    engine.update(other)
    assert sorted(path.name for path in stub.folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    greedy = replace(SAMPLING, temperature=0.0)
    written = engine.generate(PROMPTS, count=1, sampling=greedy)
    wanted = ModelEngine(AR, other).generate(PROMPTS, count=1, sampling=greedy)
    assert [group[0].tokens for group in written] == [group[0].tokens for group in wanted]


def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not(stub: Stub) -> None:
    engine = engine_of(stub)
    stub.statuses = [503, 429]
    assert len(engine.generate([[1]], count=1, sampling=SAMPLING)[0]) == 1
    stub.requests.clear()
    stub.statuses = [400] * 9
    with pytest.raises(UserError, match=r"refuses the request \(HTTP 400: busy, come again\)"):
        engine.generate([[1]], count=1, sampling=SAMPLING)
    assert len(stub.requests) == 1
    stub.statuses = [500] * 9
    with pytest.raises(UserError, match=r"no reply \(HTTP 500: busy, come again\). Is the server there"):
        engine.generate([[1]], count=1, sampling=SAMPLING)


def test_no_server_and_slow_servers_are_said(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(stub)
    engine.server.timeout = 0.3
    monkeypatch.setattr(remote, "TRIES", 2)
    stub.lock.acquire()
    try:
        with pytest.raises(UserError, match=r"no reply \(TimeoutError"):
            engine.generate([[1]], count=1, sampling=SAMPLING)
    finally:
        stub.lock.release()
    stub.server.shutdown()
    stub.server.server_close()
    with pytest.raises(UserError, match=r"no reply \(ConnectionRefusedError"):
        engine.generate([[1]], count=1, sampling=SAMPLING)


def first(reply: dict[str, Any], **changes: Any) -> dict[str, Any]:
    reply["choices"][0].update(changes)
    return reply


def log_probs(reply: dict[str, Any], **changes: Any) -> dict[str, Any]:
    reply["choices"][0]["logprobs"].update(changes)
    return reply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda reply: [], "TypeError"),
        (lambda reply: {"error": "no"}, "KeyError"),
        (lambda reply: {"choices": reply["choices"][:1]}, "1 completions came, 2 were asked for"),
        (lambda reply: first(reply, logprobs=None), "gives token ids and their log-probabilities"),
        (lambda reply: first(reply, finish_reason="stop"), "finish_reason is 'stop' and the last token"),
        (lambda reply: first(reply, finish_reason="abort"), "finish_reason is 'abort'"),
        (lambda reply: log_probs(reply, tokens=["a"] * 6), "tokens come as text"),
        (lambda reply: log_probs(reply, tokens=["token_id:5"] * 5), "5 tokens with 6 log-probabilities"),
        (lambda reply: log_probs(reply, tokens=["token_id:99999"] * 6), "the server has another model"),
        (lambda reply: log_probs(reply, token_logprobs=[0.5] * 6), "a log-probability is above 0"),
        (lambda reply: log_probs(reply, token_logprobs=[None] * 6), "TypeError"),
    ],
)
def test_replies_that_cannot_be_right_are_refused(stub: Stub, spoil: Any, message: str) -> None:
    stub.spoil = spoil
    with pytest.raises(UserError, match=message):
        engine_of(stub).generate([[1]], count=2, sampling=replace(SAMPLING, stop_ids=()))


def test_the_flags_say_which_engine(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(CONFIG)
    own = open_engine(RolloutSettings(rollout_rows=3), AR, model, TOKENIZER, torch.bfloat16)
    assert isinstance(own, ModelEngine) and own.rows == 3 and own.dtype == torch.bfloat16
    served = open_engine(RolloutSettings(rollout_url=f"{stub.address}/v1"), AR, model, TOKENIZER, None)
    assert isinstance(served, ServedEngine) and served.name == "tiny" and served.positions == 64
    served.update(model)
    served.update(model)
    assert capsys.readouterr().err.count("goes on with its own weights") == 1
    diffusion = Diffusion(FamilyConfig(architecture="diffusion"), SpecialIds.of(TOKENIZER))
    for flags, family, message in (
        ({"rollout_url": "127.0.0.1:8000"}, AR, "give an address such as"),
        ({"rollout_url": f"{stub.address}/v1", "rollout_folder": "x"}, AR, "give both, or neither"),
        ({"rollout_folder": "x"}, AR, "give --rollout_url as well"),
        ({"rollout_url": f"{stub.address}/v1"}, diffusion, "which diffusion does not"),
    ):
        with pytest.raises(UserError, match=message):
            open_engine(RolloutSettings(**flags), family, model, TOKENIZER, None)  # type: ignore[arg-type]


def test_a_key_is_sent_along(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    send = remote.http.client.HTTPConnection.request
    monkeypatch.setattr(
        remote.http.client.HTTPConnection, "request",
        lambda self, method, path, data, headers: seen.append(headers) or send(self, method, path, data, headers),
    )  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine_of(stub)
    assert seen[0]["Authorization"] == "Bearer secret"
