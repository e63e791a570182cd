"""The command line answers at once, and its exit codes mean what they say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm import __version__, cli
from minillm.cli import COMMANDS, main
from minillm.log import UserError

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "tokenizers")


def in_fresh_process(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_of_every_command_works_without_heavy_libraries() -> None:
    code = f"""
import contextlib, io, sys
from minillm.cli import COMMANDS, main
for name in COMMANDS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            main([*name.split(), "--help"])
        except SystemExit as stop:
            assert stop.code == 0, name
    assert "--config" in text.getvalue() and name in text.getvalue(), name
assert main(["--help"]) == 0
print("HEAVY", [name for name in {HEAVY} if name in sys.modules])
"""
    out = in_fresh_process(code)
    assert out.endswith("HEAVY []\n")
    assert all(name in out for name in COMMANDS)


def test_mistakes_need_no_heavy_libraries() -> None:
    code = f"""
import sys
from minillm.cli import main
for argv in (["pretrain", "--hiden_size", "3"], ["sft", "--batch_size", "0"], ["dpo", "--dtype", "float8"],
             ["export", "--output", "x"], ["evaluate", "--ckpt", "x"], ["generate"], ["pipeline", "--nothing"]):
    assert main(argv) == 2, argv
print("HEAVY", [name for name in {HEAVY} if name in sys.modules])
"""
    assert in_fresh_process(code) == "HEAVY []\n"


SCRIPTS = {path.name for path in (ROOT / "trainer").glob("train_*.py")}
COMMAND_OF = {"full_sft": "sft", "distillation": "distill", "distill_reason": "reason"}  # where the names differ


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_trainer_scripts_forward_from_anywhere_and_fail_fast(script: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "trainer" / script), "--learning-rat", "1"]
    seconds, done = [], None
    for _ in range(3):  # a busy machine may be slow once
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 1.0:
            break
    assert done is not None and done.returncode == 2
    assert "Did you mean --learning_rate?" in done.stderr and "Traceback" not in done.stderr
    name = script.removeprefix("train_").removesuffix(".py")
    assert f"minillm {COMMAND_OF.get(name, name)} --help" in done.stderr
    assert min(seconds) < 1.0
    assert not any(tmp_path.iterdir())


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "minillm", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == f"minillm {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrian"], "there is no command 'pretrian'. Did you mean 'pretrain'?"),
        (["data", "demmo"], "Did you mean 'data demo'?"),
        (["data"], "there is no command 'data'"),
        (["export"], "--checkpoint is required"),
        (["generate", "--checkpoint", "x"], "--prompt is required"),
        (["generate", "--checkpoint", "x", "--prompt", "y", "--top_p", "0"], "must be greater than 0"),
    ],
)
def test_wrong_usage_exits_with_two(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_what_the_user_can_fix_exits_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nothing.pt"
    assert main(["export", "--checkpoint", str(missing), "--output", str(tmp_path / "out")]) == 1
    assert f"error: there is no checkpoint {missing}" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(missing), "--prompt", "x"]) == 1
    assert main(["evaluate", "--checkpoint", str(missing), "--data_path", "x"]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 1),
        (OSError(28, "No space left on device", "a.bin"), 1),
        (None, 0),
    ],
)
def test_exit_codes(
    error: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(cli, "execute", run)
    assert main([]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_no_command_prints_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["help"], ["-h"]):
        assert main(argv) == 0
        assert "usage: minillm COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("group", ["data", "checkpoint"])
def test_a_group_of_commands_lists_its_own(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([group, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: minillm {group} COMMAND" in shown
    assert all(line.startswith(f"  {group} ") for line in shown.splitlines()[2:])
