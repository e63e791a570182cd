"""A program that the nursery starts is, as far as it and its parent can tell, a Python process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from test_docs import ROOT, shell_environment
from training import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the nursery needs Linux")
FORKED = "import sys; print('torch._dynamo' in sys.modules)"  # only where the nursery started it


def run(python: str | Path, *words: str, **named: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), *words], capture_output=True, text=True, timeout=120, **named)


def alive(pid: int) -> bool:
    """False as soon as it is a zombie, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go between opening and reading
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "code",
    [
        "print('out'); print('err', file=sys.stderr)",
        "sys.exit(3)",
        "sys.exit('a reason')",
        "print('never flushed', end=''); os.kill(os.getpid(), 15)",
        "os.kill(os.getpid(), 9)",
        "import atexit; atexit.register(print, 'last'); print('first', end=' ')",
        "print(sys.argv, __name__, os.getcwd(), sys.path[:2], os.environ['MINILLM_X'], 'TMPDIR' in os.environ)",
        "print(sys.stdin.read(), sys.stdin.encoding, sys.stdout.encoding, sys.stdout.line_buffering)",
        "print(subprocess.run([sys.executable, '-c', 'import sys; sys.exit(7)']).returncode)",
        "print([os.path.exists(f'/proc/self/fd/{number}') for number in range(3, 9)])",
        "print([name for name in sys.modules if name.split('.')[0] in ('minillm', 'transformers', 'huggingface_hub')])",
        "import torch; print(torch.get_num_threads(), (torch.ones(300, 300) @ torch.ones(300, 300)).sum())",
        "print(open('data').read()); os._exit(4)",
    ],
)
def test_a_program_ends_and_prints_as_in_a_process_of_its_own(code: str, nursery: Nursery, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the folder")
    variables = {**os.environ, "PYTHONPATH": "relative", "MINILLM_X": "é"}
    one, other = (
        run(python, "-c", f"import os, subprocess, sys; {code}", "a", "b c", cwd=tmp_path, env=variables, input="read")
        for python in (sys.executable, nursery.python)
    )
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


def test_modules_files_and_standard_input_are_run_and_their_errors_shown(nursery: Nursery, tmp_path: Path) -> None:
    program = "import sys; print(sys.argv, __name__, sys.path[0]); from missing_module import x"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(program)
    (tmp_path / "program.py").write_text(program)
    for words, given in ((["-m", "package"], ""), (["package/../program.py"], ""), (["-"], program)):
        one, other = (
            run(python, *words, "word", cwd=tmp_path, input=given) for python in (sys.executable, nursery.python)
        )
        assert one.stdout == other.stdout and "['" in one.stdout
        assert one.returncode == other.returncode == 1
        assert one.stderr.splitlines()[-1] == other.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_program(number: signal.Signals, nursery: Nursery) -> None:
    code = f"import signal, time; signal.signal({number:d}, lambda *_: exit(9)); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([nursery.python, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "\n"
    process.send_signal(number)
    assert process.wait(30) == 9


def test_a_program_ends_with_whoever_asked_for_it_and_with_the_nursery(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with closing(Nursery(tmp_path, libraries=())) as own:
        first, second = (
            subprocess.Popen([own.python, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
        )
        pids = [int(process.stdout.readline()) for process in (first, second) if process.stdout]
        first.kill()
        wait_until_gone(pids[0])
        assert alive(pids[1]) and second.poll() is None
    wait_until_gone(pids[1])
    assert second.wait(30) != 0 and own.process is not None and own.process.returncode == 0


def test_the_programs_of_the_tests_are_forked(nursery: Nursery, tmp_path: Path) -> None:
    for variables in (environment(), shell_environment(ROOT, tmp_path / "bin", str(nursery.python))):
        assert run(nursery.python, "-c", FORKED, env=variables).stdout == "True\n"


def test_random_numbers_differ_from_program_to_program(nursery: Nursery) -> None:
    code = "import random, torch; print(random.random(), torch.rand(1).item())"
    one, other = (run(nursery.python, "-c", code).stdout.split() for _ in range(2))
    assert one[0] != other[0] and one[1] != other[1]


def test_what_would_not_be_the_same_is_a_true_process(nursery: Nursery) -> None:
    assert run(nursery.python, "-c", FORKED).stdout == "True\n"
    assert run(nursery.python, "-c", FORKED, env={**os.environ, "OMP_NUM_THREADS": "3"}).stdout == "False\n"
    assert run(nursery.python, "-X", "utf8", "-c", FORKED).stdout == "False\n"
    read, write = os.pipe()
    assert run(nursery.python, "-c", FORKED, pass_fds=[read]).stdout == "False\n"
    os.close(read)
    os.close(write)
    assert run(nursery.python, "--version").stdout.startswith("Python 3")


def test_without_a_nursery_everything_is_a_true_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with closing(Nursery(tmp_path)) as none:
        assert run(none.python, "-c", FORKED).stdout == "False\n"
