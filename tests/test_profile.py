"""--profile: a trace and a page of a few steps, and the same training as without."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import DENSE, random_model

from minillm.cli import execute
from minillm.methods.base import Method
from minillm.train import profile
from minillm.train.precision import compile_layers


def train(folder: Path, *flags: str) -> Path:
    """A tiny pretraining run in this process; its folder."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the {n}th cat sat on the mat. " * 5}) + "\n" for n in range(40)))
    out = folder / "out"
    execute([
        "pretrain", "--data_path", str(text), "--validation_data", str(text), "--out_dir", str(out), "--no_wandb",
        "--hidden_size", "32", "--num_hidden_layers", "2", "--max_seq_len", "32", "--batch_size", "2",
        "--device", "cpu", "--dtype", "float32", "--eval_samples", "2", "--eval_every", "100",
        "--max_steps", "7", *flags,
    ])  # fmt: skip
    return out / "pretrain_32"


def shares(page: str) -> dict[str, float]:
    """The first table of the page: part -> percent."""
    rows = [line.strip("| ").split(" | ") for line in page.split("| operator")[0].splitlines() if line.endswith("% |")]
    return {row[0]: float(row[2].removesuffix(" %")) for row in rows}


def test_a_profiled_run_leaves_a_trace_and_a_page_and_learns_the_same(tmp_path, capsys):
    for name in ("plain", "profiled"):
        (tmp_path / name).mkdir()
    plain = train(tmp_path / "plain")
    capsys.readouterr()
    profiled = train(tmp_path / "profiled", "--profile", "2")
    said = capsys.readouterr().err
    assert not (plain / "profile").exists()
    page = (profiled / "profile" / "summary.md").read_text()
    assert page.startswith("# Profile of 2 steps") and page.splitlines()[0] in said
    found = shares(page)
    wanted = {"attention", "feed-forward", "norms and rotary", "embedding", "head and loss", "optimizer", "data"}
    assert wanted | {"gradient clipping", "gradient accumulation"} <= set(found)
    assert sum(found.values()) == pytest.approx(100, abs=1) and found["other"] < 60
    assert "tokens/s with the profiler on" in page and "utilisation" in page and "peak memory" in page
    events = json.loads(gzip.decompress((profiled / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == profile.STEP and event.get("cat") == "user_annotation"]
    assert len(steps) == 2
    weights = [torch.load(folder / "last.pt", weights_only=True)["model_state_dict"] for folder in (plain, profiled)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_folder_that_cannot_be_written_is_a_warning_and_training_goes_on(tmp_path, capsys, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(profile, "_export", full)
    folder = train(tmp_path, "--profile")
    assert "warning: --profile: " in capsys.readouterr().err
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 7


class Event(SimpleNamespace):
    """What `attribute` reads of a profiler's event; times are microseconds."""

    def __init__(
        self, name: str, start: int, end: int, parent: Event | None = None, seq: int = -1, own: int = 0
    ) -> None:
        super().__init__(
            name=name, id=(start, end, name), time_range=SimpleNamespace(start=start, end=end), cpu_parent=parent,
            sequence_nr=seq, thread=1, fwd_thread=1, is_async=False, self_cpu_time_total=own,
            self_device_time_total=2 * own, device_type=torch.autograd.DeviceType.CPU, input_shapes=[[2, 3], []],
        )  # fmt: skip


def step_of(*build: Callable[[Event], list[Event]]) -> list[Event]:
    step = Event(profile.STEP, 0, 1000)
    return [step, *(event for each in build for event in each(step))]


def test_the_backward_pass_of_a_part_counts_as_that_part():
    def both_passes(step: Event) -> list[Event]:
        outer = Event(profile.RANGE + profile.HEAD, 10, 100, step)
        inner = Event(profile.RANGE + profile.FEED_FORWARD, 20, 60, outer)
        back = "autograd::engine::evaluate_function: "
        return [
            outer, inner, Event("aten::mm", 30, 50, inner, seq=7, own=20),
            Event("aten::sum", 70, 90, outer, seq=8, own=20),
            Event(back + "SumBackward0", 110, 120, step, seq=8, own=5),
            Event(back + "MmBackward0", 130, 180, step, seq=7, own=1),
            Event(back + "AccumulateGrad", 190, 200, step, own=3),
            Event("Optimizer.step#AdamW.step", 300, 400, step, own=100),
        ]  # fmt: skip

    parts, operators = profile.attribute(step_of(both_passes), on_device=False)
    assert {part: round(seconds * 1e6) for part, seconds in parts.items()} == {
        profile.FEED_FORWARD: 21, profile.HEAD: 25, profile.ACCUMULATION: 3, profile.OPTIMIZER: 100,
    }  # fmt: skip
    assert (operators[0].name, operators[0].shapes) == ("Optimizer.step#AdamW.step", "2x3")
    assert profile.attribute(step_of(both_passes), on_device=True)[0][profile.HEAD] == pytest.approx(50e-6)


def test_what_runs_for_the_data_counts_as_data_and_what_runs_between_steps_not_at_all():
    def taking(step: Event) -> list[Event]:
        outer = Event(profile.RANGE + profile.DATA, 10, 100, step)
        inner = Event(profile.RANGE + profile.ATTENTION, 20, 60, outer)
        return [outer, inner, Event("aten::mm", 30, 50, inner, own=20), Event("aten::mm", 2000, 2100, None, own=100)]

    parts, _ = profile.attribute(step_of(taking), on_device=False)
    assert parts == {profile.DATA: pytest.approx(20e-6)}


def test_ranges_around_compiled_layers_compile_nothing_anew_and_are_taken_away():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model, tokens = random_model(DENSE), torch.randint(50, (2, 16))
    compile_layers(model, backend="aot_eager")
    model(tokens).hidden.sum().backward()
    graphs, calls = counters["stats"]["unique_graphs"], [layer._compiled_call_impl for layer in model.model.layers]
    job: Any = SimpleNamespace(model=model, method=Method(), train_data=SimpleNamespace(take=None))
    job.train_data.take = lambda: None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, ExitStack() as ranges:
        profile.lay_ranges(job, ranges)
        with torch.profiler.record_function(profile.STEP):
            model(tokens).hidden.sum().backward()
    parts, _ = profile.attribute(profiler.events(), on_device=False)
    assert counters["stats"]["unique_graphs"] == graphs
    assert {f"{profile.COMPILED}: {kind}" for kind in ("products", "attention kernel", "the rest, fused")} <= set(parts)
    assert [layer._compiled_call_impl for layer in model.model.layers] == calls
    assert "loss" not in vars(job.method) and model._compiled_call_impl is None
    torch._dynamo.reset()


def test_only_the_main_process_profiles_and_a_short_run_is_profiled_from_where_it_can_be(monkeypatch):
    job: Any = SimpleNamespace(total_steps=10, state=SimpleNamespace(step=0))
    assert (profile.StepProfile(job, 3).first, profile.StepProfile(job, 3).steps) == (profile.WARM_UP, 3)
    job.state.step = 8  # resumed shortly before the end
    assert (profile.StepProfile(job, 3).first, profile.StepProfile(job, 3).steps) == (0, 2)
    monkeypatch.setattr(profile, "is_main", lambda: False)
    assert profile.StepProfile(job, 3).steps == 0
