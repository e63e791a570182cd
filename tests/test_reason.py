"""Reasoning distillation: what the tags weigh, in every family; traces asked from a server, checked and resumed."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import CPU, belief, diffusion
from test_distill import model_of, rows
from training import TINY, equal, load, without_times

from minillm import remote
from minillm.cli import main
from minillm.data import endpoint
from minillm.data.endpoint import Reply
from minillm.data.reasoning import INSTRUCTION, Dropped, trace_of
from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Family, Noise, TokenBatch
from minillm.methods.likelihood import Likelihood
from minillm.methods.reason import ReasoningTraces
from minillm.text.answers import has_format, is_right
from minillm.text.tokenizer import TAG_TOKENS, Tokenizer

TAGS = (31, 40)  # of the tokens that the denoisers' packed row trains: 2 of 6
FAMILIES: dict[str, Callable[[], Family]] = {"ar": Autoregressive, "diffusion": diffusion, "sdd": belief}
SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "reason_demo.jsonl.gz"


# What tags weigh.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
def test_tags_weigh_more_and_the_loss_stays_a_weighted_mean(name: str, experts: bool) -> None:
    family = FAMILIES[name]()
    model = model_of(family, 0, use_moe=experts)
    method = ReasoningTraces(family, 3, tags=TAGS, weight=10.0)
    prepared = method.prepare(model, rows(5), CPU, 2, 7)
    loss, metrics = method.loss(model, prepared.data)

    tokens = TokenBatch.from_numpy(rows(5), CPU)
    view = family.view(model, tokens, Noise.of(3, tokens, 2, 7))
    losses = -model.logits(view.through(model).hidden).log_softmax(-1).gather(-1, view.targets[..., None])[..., 0]
    factor = torch.where((view.targets == TAGS[0]) | (view.targets == TAGS[1]), 10.0, 1.0)
    assert loss.item() == pytest.approx((losses * view.weights * factor).sum().item(), rel=1e-4)
    assert prepared.count == 5 * (4 + 2 * 10)  # whatever was hidden

    # Reported is the loss without these weights, as fine-tuning reports it.
    plain = Likelihood(family, 3)
    wanted = plain.loss(model, plain.prepare(model, rows(5), CPU, 2, 7).data).metrics
    for name in ("loss", "accuracy"):
        assert metrics[name][1] == wanted[name][1]
        assert metrics[name][0].item() == pytest.approx(wanted[name][0].item(), rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_weight_of_one_is_fine_tuning(name: str) -> None:
    family = FAMILIES[name]()
    gradients = []
    for method in (ReasoningTraces(family, 3, tags=TAGS, weight=1.0), Likelihood(family, 3)):
        model = model_of(family, 0).train()
        prepared = method.prepare(model, rows(4), CPU, 2, 0)
        (method.loss(model, prepared.data).loss / prepared.count).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    assert torch.equal(*gradients)


def test_the_share_of_tags_that_are_found_is_told() -> None:
    model = model_of(Autoregressive(), 0)
    method = ReasoningTraces(Autoregressive(), 3, tags=TAGS, weight=10.0)
    hits, count = method.loss(model, method.prepare(model, rows(5), CPU, 2, 0).data).metrics["tag_accuracy"]
    tokens = TokenBatch.from_numpy(rows(1), CPU)
    best = model.logits(model(tokens.tokens, positions=tokens.positions, segments=tokens.segments).hidden).argmax(-1)
    # The tags stand in columns 3 and 10: they are predicted from the ones before.
    assert count == 10 and hits.item() == 5 * ((best[0, 2] == TAGS[0]) + int(best[0, 9] == TAGS[1]))


# Runs.

STEPS = ("--max_steps", "4", "--save_every", "2", "--eval_every", "2", "--max_seq_len", "96")


def traces(path: Path, count: int = 60) -> Path:
    with open(path, "w", encoding="utf-8") as stream:
        for n in range(count):
            text = f"<think>\n{n} and {n} is {2 * n}\n</think>\n<answer>\n{2 * n}\n</answer>"
            messages = [{"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": text}]
            stream.write(json.dumps({"conversations": messages}) + "\n")
    return path


def run(data: Path, out: Path, *flags: str) -> Path:
    assert main(["reason", "--data_path", str(data), "--out_dir", str(out), *TINY, *STEPS, *flags]) == 0
    return next(path.parent for path in out.glob("*/training_config.json"))


@pytest.mark.parametrize(
    "flags",
    [(), ("--use_moe", "--num_experts", "2"), ("--architecture", "diffusion"), ("--architecture", "sdd")],
    ids=["ar", "moe", "diffusion", "sdd"],
)
def test_a_run_that_is_resumed_ends_the_same(flags: tuple[str, ...], tmp_path: Path) -> None:
    data = traces(tmp_path / "traces.jsonl")
    first = run(data, tmp_path / "one", *flags)
    assert "reason_32" in first.name
    again = tmp_path / "two" / first.name
    shutil.copytree(first, again)
    for name in ("last.pt", "best_model.pt", "step_000004.pt"):
        (again / name).unlink(missing_ok=True)
    run(data, tmp_path / "two", *flags, "--resume_from", "auto")
    one, two = (without_times(load(path / "last.pt")) for path in (first, again))
    for key in ("model_state_dict", "optimizer_state_dict", "training_log", "validation_log", "rng_state"):
        assert equal(one[key], two[key]), key
    columns = (first / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {"train/tag_accuracy", "val/perplexity"} <= {*columns}


def test_a_tokenizer_without_tags_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Tokenizer.load().json_text
    for tag in TAG_TOKENS:
        text = text.replace(f'"{tag}"', f'"{tag}-"')
    Tokenizer(text, Tokenizer.load().chat_template).save(tmp_path / "other")
    arguments = ["--data_path", str(traces(tmp_path / "t.jsonl")), "--tokenizer", str(tmp_path / "other")]
    assert main(["reason", *arguments, "--out_dir", str(tmp_path / "out"), *TINY, *STEPS]) == 1
    assert "no token <think>" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not there")
def test_real_traces_are_read_and_their_tags_are_single_tokens(tmp_path: Path) -> None:
    from minillm.text.chat import encode_chat

    with gzip.open(SHARED, "rt", encoding="utf-8") as stream:
        lines = [next(stream) for _ in range(40)]
    (tmp_path / "real.jsonl").write_text("".join(lines), encoding="utf-8")
    folder = run(tmp_path / "real.jsonl", tmp_path / "out", "--max_seq_len", "512", "--max_steps", "2")
    assert (folder / "last.pt").exists()
    tokenizer = Tokenizer.load()
    for line in lines:
        messages = json.loads(line)["conversations"]
        ids, mask = encode_chat(tokenizer, messages)
        assert has_format(messages[-1]["content"])
        for tag in TAG_TOKENS:
            assert [trained for token, trained in zip(ids, mask) if token == tokenizer.token_to_id(tag)] == [True]


# Replies taken apart.


@pytest.mark.parametrize(
    ("reply", "thought", "answer"),
    [
        (Reply("<think>9 and 9</think> <answer>18</answer>", "", "stop"), "9 and 9", "18"),
        (Reply("9 and 9\n</think>\nIt is $18.", "", "stop"), "9 and 9", "18"),  # the server began the thought
        (Reply("So it is \\boxed{18}.", "9 and 9", "stop"), "9 and 9", "18"),  # a field of its own
        (Reply("<think>\n\n9 and 9\n</think><answer>\n18 apples\n</answer>\n", "", ""), "9 and 9", "18 apples"),
    ],
    ids=["tags", "open-thought", "own-field", "white-space"],
)
def test_a_reply_becomes_a_trace(reply: Reply, thought: str, answer: str) -> None:
    trace = trace_of(reply, "18")
    assert (trace.thought, trace.answer) == (thought, answer)
    assert has_format(trace.text) and is_right(trace.text, "18")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("<think>9 and", "", "length"), "cut off at max_tokens"),
        (Reply("18", "", "stop"), "no chain of thought"),
        (Reply("<think> </think>18", "", "stop"), "no chain of thought"),
        (Reply("<think>9</think>", "", "stop"), "no answer"),
        (Reply("<think>write <answer>1</answer></think>18", "", "stop"), "tags inside the thought or the answer"),
    ],
)
def test_a_reply_that_is_no_trace_says_why(reply: Reply, reason: str) -> None:
    with pytest.raises(Dropped, match=reason):
        trace_of(reply, "18")


# A server.


class Stub:
    """Answers what `script` says of (question, how often it was asked before, seed); keeps what it was asked."""

    def __init__(self, script: Callable[[str, int, int], Any]) -> None:
        self.script, self.requests, self.lock = script, [], threading.Lock()
        self.address = ""

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        question = body["messages"][-1]["content"]
        with self.lock:
            before = sum(each["messages"][-1]["content"] == question for each in self.requests)
            self.requests.append({**body, "path": path})
        return self.script(question, before, body["seed"])


def completion(content: str, finish: str = "stop") -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish}]}


@contextmanager
def serving(script: Callable[[str, int, int], Any]) -> Iterator[Stub]:
    stub = Stub(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, value = stub.answer(self.path, body)
            content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stub.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)


def prompts(path: Path, count: int = 4) -> Path:
    text = "".join(json.dumps({"question": f"{n} + {n}?", "answer": f"#### {2 * n}"}) + "\n" for n in range(count))
    path.write_text(text, encoding="utf-8")
    return path


def prepare(source: Path, output: Path, stub: Stub, *flags: str) -> int:
    return main(["data", "prepare-reasoning", "--input", str(source), "--output", str(output), "--endpoint",
                 stub.address, "--model", "teacher", "--samples", "2", *flags])  # fmt: skip


def right(question: str, before: int, seed: int) -> tuple[int, Any]:
    n = int(question.split()[0])
    return completion(f"<think>{n} twice, way {seed}</think><answer>{2 * n}</answer>")


def written(output: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["conversations"] for line in output.read_text(encoding="utf-8").splitlines()]


def test_right_replies_become_rows_that_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(question: str, before: int, seed: int) -> tuple[int, Any]:
        if question.startswith("1"):
            return completion("<think>a slip</think><answer>3</answer>")
        if question.startswith("2"):
            return completion("<think>the same</think><answer>4</answer>")
        if question.startswith("3"):
            return completion("<think>long", "length")
        return right(question, before, seed)

    output = tmp_path / "traces.jsonl"
    with serving(script) as stub:
        assert prepare(prompts(tmp_path / "p.jsonl"), output, stub) == 0
    conversations = written(output)
    assert len(conversations) == 3  # two of 0, one of 2
    assert all(has_format(each[-1]["content"]) for each in conversations)
    assert [each[0] for each in conversations] == [
        {"role": "user", "content": q} for q in ("0 + 0?", "0 + 0?", "2 + 2?")
    ]
    said = capsys.readouterr().err
    assert "3 of 8 replies kept (2 of 4 prompts)" in said
    assert "2 x wrong answer" in said and "1 x the same again" in said and "2 x cut off at max_tokens" in said
    record = json.loads((tmp_path / "traces.jsonl.prepared.json").read_text(encoding="utf-8"))
    assert record["kept"] == 3 and record["dropped"]["wrong answer"] == 2 and record["prompts_with_a_trace"] == 2
    request = stub.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["model"] == "teacher"
    assert request["messages"][0] == {"role": "system", "content": INSTRUCTION}
    assert len({each["seed"] for each in stub.requests}) == 8
    run(output, tmp_path / "out", "--max_steps", "1")


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MOST_FAILURES", 3)
    source = prompts(tmp_path / "p.jsonl", 6)
    with serving(right) as stub:
        assert prepare(source, tmp_path / "whole.jsonl", stub, "--concurrency", "1") == 0

    def breaks_down(question: str, before: int, seed: int) -> tuple[int, Any]:
        return (500, "out of memory") if len(stub.requests) > 5 else right(question, before, seed)

    output = tmp_path / "traces.jsonl"
    with serving(breaks_down) as stub:
        assert prepare(source, output, stub, "--concurrency", "1") == 1
    assert "the same command goes on where it was" in capsys.readouterr().err
    assert not output.exists()
    journal = tmp_path / "traces.jsonl.replies"
    with open(journal, "ab") as notes:
        notes.write(b'{"prompt": 3, "samp')  # killed while it wrote
    with serving(right) as stub:
        assert prepare(source, output, stub, "--concurrency", "1") == 0
        assert len(stub.requests) == 12 - 5
        assert prepare(source, output, stub) == 0  # nothing to ask
        assert len(stub.requests) == 12 - 5
        assert prepare(source, output, stub, "--samples", "3") == 0
        assert len(stub.requests) == 12 - 5 + 6
    assert len(written(output)) == 18 and len(written(tmp_path / "whole.jsonl")) == 12


def test_a_busy_server_is_asked_again_and_a_lost_reply_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(question: str, before: int, seed: int) -> tuple[int, Any]:
        if question.startswith("1"):
            return 200, "not json"
        return right(question, before, seed) if before % 2 else (429, "busy")

    with serving(script) as stub:
        assert prepare(prompts(tmp_path / "p.jsonl", 2), tmp_path / "t.jsonl", stub, "--concurrency", "1") == 0
    assert "2 of 2 replies kept (1 of 2 prompts), 2 x no reply" in capsys.readouterr().err


def test_what_is_refused_ends_the_run_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda *_: (404, "no model teacher")) as stub:
        assert prepare(prompts(tmp_path / "p.jsonl"), tmp_path / "t.jsonl", stub, "--concurrency", "1") == 1
        assert len(stub.requests) == 1
    assert "no model teacher" in capsys.readouterr().err


def test_replies_of_other_settings_and_foreign_outputs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = prompts(tmp_path / "p.jsonl"), tmp_path / "t.jsonl"
    with serving(right) as stub:
        assert prepare(source, output, stub) == 0
        assert prepare(source, output, stub, "--temperature", "0.1") == 1
        assert "replies of other prompts, another model or other settings" in capsys.readouterr().err
        (tmp_path / "mine.jsonl").write_text("{}\n", encoding="utf-8")
        assert prepare(source, tmp_path / "mine.jsonl", stub) == 1
        assert (tmp_path / "mine.jsonl").read_text(encoding="utf-8") == "{}\n"
        assert prepare(source, tmp_path / "t.txt", stub) == 2


def test_nothing_right_is_an_error_that_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda *_: completion("<think>no idea</think><answer>-1</answer>")) as stub:
        assert prepare(prompts(tmp_path / "p.jsonl"), tmp_path / "t.jsonl", stub) == 1
    assert "no reply could be kept" in capsys.readouterr().err
    assert not (tmp_path / "t.jsonl").exists()
