"""Work that is spread over tasks gives the bytes of the work done here, whoever does it and however often it fails."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minillm.cli import execute
from minillm.data import clean, executors, prepare_text
from minillm.data.clean import CleanSettings
from minillm.data.executors import ExecutorSettings, FileTasks
from minillm.data.prepare_text import PrepareTextSettings, tokens
from minillm.log import UserError

SOURCE = Path(__file__).resolve().parents[1] / "src"
RAY = ExecutorSettings(executor="ray")
WORDS = ("apple", "river", "stone", "cloud", "lamp", "violin", "garden", "winter", "copper", "engine", "mirror")


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * (place + 3) + place * place) % len(WORDS)] for place in range(12))


def conversations(count: int, start: int = 0) -> list[Any]:
    """Some are alike, some are not usable."""
    rows: list[Any] = []
    for number in range(start, start + count):
        question = {"role": "user", "content": f"Question {number}: {sentence(number)[:30]}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": f"Answer {number}: {sentence(number)}."}]})
        if number % 7 == 6:
            rows += [rows[0], {"text": "no conversation"}, {"prompt": "Why?", "response": "Because of the RAIN!"}]
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows) + b"{broken\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder of files of unequal size, with repeated rows in different files."""
    folder = tmp_path / "rows"
    for number, count in enumerate((30, 1, 12, 25)):
        write(folder / f"{number}.jsonl{'.gz' if number == 2 else ''}", conversations(count, 10 * number))
    (folder / "4.json").write_text(json.dumps(conversations(9)), encoding="utf-8")
    return folder


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 1_000)  # several groups a file
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # tasks set it
    folder = tmp_path / "texts"
    for number, count in enumerate((40, 1, 25)):
        documents: list[Any] = [{"text": f"Story {n} of {number}: {sentence(n)} 小猫"} for n in range(count)]
        write(folder / f"{number}.jsonl", [*documents, {"text": ""}, {"title": "no text"}])
    (folder / "plain.txt").write_text("One paragraph.\n\nAnother one.\n", encoding="utf-8")
    return folder


def in_tasks(world_size: int, fail_after: int | None = None) -> Callable[..., bool]:
    """What takes the place of a cluster: all tasks, one after another, the last one first."""

    def run_tasks(work: FileTasks, settings: ExecutorSettings, again: executors.Again) -> bool:
        work.folder.mkdir(exist_ok=True)
        for rank in list(reversed(range(world_size)))[:fail_after]:
            work(None, rank, world_size)
        if work.missing():
            raise UserError("the power failed")
        return True

    return run_tasks


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def settings_for(rows: Path, output: Path, **more: Any) -> CleanSettings:
    return CleanSettings(input=str(rows), output=str(output), report=f"{output}.report.json", **more)


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
@pytest.mark.parametrize("near", ["off", "similar"])
def test_cleaning_in_tasks_gives_the_same_bytes(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, near: str
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)  # so that the report names the same files
        monkeypatch.setattr(clean, "run_tasks", in_tasks(world_size))
        settings = settings_for(Path("..", "rows"), Path("out.jsonl"), near_duplicates=near, mask_pii=True)
        clean.run(settings, RAY if name == "there" else executors.LOCAL)
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    assert here == there and len(there) == 3
    assert here["out.jsonl"].count(b"\n") > 50 and b"4.json" in here["out.jsonl.removed.jsonl"]


@pytest.mark.parametrize("world_size", [1, 2, 9])
def test_tokenizing_in_tasks_gives_the_same_bytes(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    more: dict[str, Any] = {"val_fraction": 0.2, "shard_tokens": "0.2K", "vocab_size": 300}
    prepare_text.run(PrepareTextSettings((str(texts),), str(tmp_path / "here"), **more))
    monkeypatch.setattr(prepare_text, "run_tasks", in_tasks(world_size))
    prepare_text.run(PrepareTextSettings((str(texts),), str(tmp_path / "there"), **more), RAY)
    assert content(tmp_path / "here") == content(tmp_path / "there")
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert len(config["train"]["files"]) > 5 and config["val"]["documents"] > 3
    assert sum(config["report"]["reasons"].values()) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "texts", "there"]


def test_after_a_failure_only_what_is_left_is_done(
    rows: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean.run(settings_for(rows, tmp_path / "here.jsonl"))
    prepare_text.run(PrepareTextSettings((str(texts),), str(tmp_path / "here"), vocab_size=300))
    done: list[int] = []
    original = FileTasks._do

    def counted(self: FileTasks, number: int) -> None:
        done.append(number)
        original(self, number)

    monkeypatch.setattr(FileTasks, "_do", counted)
    for failing in (True, False):
        for module in (clean, prepare_text):
            monkeypatch.setattr(module, "run_tasks", in_tasks(3, fail_after=2 if failing else None))
        for command in (
            lambda: clean.run(settings_for(rows, tmp_path / "there.jsonl"), RAY),
            lambda: prepare_text.run(PrepareTextSettings((str(texts),), str(tmp_path / "there"), vocab_size=300), RAY),
        ):
            if failing:
                pytest.raises(UserError, command).match("power")
            else:
                command()
    # of five files two are left, and of four: those of the third task
    assert done == [2, 1, 4, 2, 1, 3, 0, 3, 0]
    assert content(tmp_path / "here") == content(tmp_path / "there")
    assert (tmp_path / "here.jsonl").read_bytes() == (tmp_path / "there.jsonl").read_bytes()


def test_results_of_other_settings_or_other_files_are_not_taken(rows: Path, tmp_path: Path) -> None:
    first = clean.file_tasks(settings_for(rows, tmp_path / "out.jsonl"))
    assert clean.file_tasks(settings_for(rows, tmp_path / "out.jsonl")).folder == first.folder
    assert clean.file_tasks(settings_for(rows, tmp_path / "out.jsonl", min_chars=2)).folder != first.folder
    write(rows / "1.jsonl", conversations(3))
    assert clean.file_tasks(settings_for(rows, tmp_path / "out.jsonl")).folder != first.folder


def test_a_damaged_file_is_named_and_the_others_are_kept(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rows / "2.jsonl.gz").write_bytes((rows / "2.jsonl.gz").read_bytes()[:-200])
    tasks = clean.file_tasks(settings_for(rows, tmp_path / "out.jsonl"))
    tasks.folder.mkdir()
    tasks(None, 0, 1)
    assert tasks.missing() == [2] and "2.jsonl.gz is damaged" in tasks.problem()
    (tasks.folder / "000001.results").write_bytes((tasks.folder / "000001.results").read_bytes()[:-3])
    with pytest.raises(UserError, match="000001.results cannot be read"):
        list(tasks.results())


def test_reading_results_runs_nothing_that_they_name(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    tasks = FileTasks(sorted, ["one"], (), tmp_path)
    (tmp_path / "000000.results").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UserError, match="no part of a result"):
        list(tasks.results())
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_is_said_before_anything_starts(rows: Path, tmp_path: Path) -> None:
    for name in ("datatrove", "ray"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    command = ["data", "clean", str(rows), "--output", str(tmp_path / "out.jsonl")]
    config = tmp_path / "config.yaml"
    for content, executor, message in (
        ("partitoin: cpu", "slurm", "Did you mean 'partition'"),
        ("merge: {tim: 3}", "slurm", "Did you mean 'time'"),
        ("tasks: 3", "slurm", "needs partition, time"),
        ("- tasks", "slurm", "name: value"),
        ("tasks: [", "slurm", "cannot be read"),
        ("pipeline: []", "ray", "takes no 'pipeline'"),
    ):
        config.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            execute([*command, "--executor", executor, "--executor_config", str(config)])
    config.write_text("partition: cpu\ntime: 1", encoding="utf-8")
    with pytest.raises(UserError, match="a machine with sbatch"):
        execute([*command, "--executor", "slurm", "--executor_config", str(config)])


def test_a_missing_library_is_named(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(UserError, match=r"minillm-trainer\[scale\]"):
        execute(["data", "clean", str(rows), "--output", str(tmp_path / "out.jsonl"), "--executor", "ray"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


# --- the executors themselves ---


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1", **more}


def both_commands(rows: str, texts: str, output: str, *more: str) -> list[list[str]]:
    """Relative paths, as people type them: their names are part of what is written."""
    cleaning = ["data", "clean", rows, "--output", f"{output}/out.jsonl", "--mask_pii"]
    tokenizing = ["data", "prepare-text", "--input", texts, "--output_dir", f"{output}/tokens", "--vocab_size", "300"]
    return [[*cleaning, *more], [*tokenizing, "--val_fraction", "0.2", "--shard_tokens", "200", *more]]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ON_RAY = """
import json, sys
import ray
from minillm.cli import execute
if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
    for command in json.loads(sys.argv[1]):
        execute(command)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # many programs start, which takes long where others are at work
def test_ray_gives_the_same_bytes(rows: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datatrove", "ray"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    for command in both_commands("rows", "texts", "here"):
        execute(command)
    Path("ray.yaml").write_text("workers: 2\nmem_per_cpu_gb: 0.1\n", encoding="utf-8")
    commands = both_commands("rows", "texts", "there", "--executor", "ray", "--executor_config", "ray.yaml")
    variables = environment(RAY_USAGE_STATS_ENABLED="0", HOME=str(tmp_path / "home"))  # Ray leaves a file at home
    (tmp_path / "home").mkdir()
    program = [sys.executable, "-c", ON_RAY, json.dumps(commands)]
    done = subprocess.run(program, env=variables, capture_output=True, text=True, timeout=600)
    if "timed out during startup" in done.stderr:
        pytest.skip("Ray did not start within the 30 s that it gives itself: the machine is busy")
    assert done.returncode == 0, done.stderr[-3_000:]
    assert everything(tmp_path / "here") == everything(tmp_path / "there")


COMMANDS = {
    "sbatch": """
        queue=$SLURM_STANDS_HERE/queue
        number=$(ls "$queue" | wc -l)
        cp "${@: -1}" "$queue/$number"
        echo "$@" >>"$SLURM_STANDS_HERE/calls"
        echo "Submitted batch job $((100 + number))"
    """,
    "srun": 'shift 3; exec "$@"',
    "scontrol": "echo here",
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # many programs start, which takes long where others are at work
def test_what_is_handed_to_slurm_gives_the_same_bytes(
    rows: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm is not here: a stand-in takes the scripts, and they are run when the command has ended."""
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    monkeypatch.chdir(tmp_path)
    slurm = tmp_path / "slurm"
    (slurm / "queue").mkdir(parents=True)
    for name, text in COMMANDS.items():
        (slurm / name).write_text(f"#!/bin/bash\nset -e\n{text}\n", encoding="utf-8")
        (slurm / name).chmod(0o755)
    path = os.pathsep.join([str(slurm), str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = environment(PATH=path, SLURM_STANDS_HERE=str(slurm), SLURM_NODELIST="here", RUN_OFFSET="0")

    def run(*command: str, **more: str) -> None:
        done = subprocess.run(command, env={**variables, **more}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]

    for command in both_commands("rows", "texts", "here"):
        execute(command)
    Path("slurm.yaml").write_text(
        "partition: cpu\ntime: '01:00:00'\ntasks: 2\nmerge: {mem_per_cpu_gb: 8}\n", encoding="utf-8"
    )
    for command in both_commands("rows", "texts", "there", "--executor", "slurm", "--executor_config", "slurm.yaml"):
        run(sys.executable, "-m", "minillm", *command)
    assert not (tmp_path / "there" / "out.jsonl").exists()
    scripts = sorted((slurm / "queue").iterdir(), key=lambda script: int(script.name))
    for script in scripts:
        array = re.search("^#SBATCH --array=0-([0-9]+)", script.read_text(), re.MULTILINE)
        assert array
        for number in range(int(array[1]) + 1):
            run("bash", str(script), SLURM_ARRAY_TASK_ID=str(number))
    there = everything(tmp_path / "there")
    assert {name: value for name, value in there.items() if "/logs/" not in name} == everything(tmp_path / "here")
    # a job for the files, its statistics, a job that puts them together, its statistics; the same for the tokens
    assert ["mem-per-cpu=8G" in script.read_text() for script in scripts] == [False, False, True, False] * 2
    assert all("#SBATCH --partition=cpu" in script.read_text() for script in scripts)
    calls = (slurm / "calls").read_text().splitlines()
    assert "--dependency=afterok:100" in calls[2] and "--dependency=afterok:104" in calls[6]
