"""scripts/: options, and the shared set-up, with stand-ins for Python, pip and uv (nothing is downloaded)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Stands for any interpreter: `-m venv` makes a folder like a virtual environment whose python is this script
# again, `-m pip` writes down its arguments and "installs" torch and minillm, the real Python does the rest.
PYTHON = """#!/usr/bin/env bash
echo "python $*" >>"$LOG"
site() {{ echo "$(dirname "$0")/../site"; }}
case "$*" in
    *"-m venv "*)
        venv="${{@: -1}}"
        mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python"; touch "$venv/pyvenv.cfg" ;;
    *"-m pip --version"*) [ ! -e "$(dirname "$0")/../no-pip" ] || exit 1 ;;
    *"-m pip install"*)
        [ -z "${{PIP_FAILS:-}}" ] || {{ echo "no network today"; exit 1; }}
        "$INSTALL" "$(dirname "$0")/.." ;;
    *"-m pip config get"*) exit 1 ;;
    *"import torch, minillm"*) [ -f "$(site)/torch/__init__.py" ] ;;
    "-I - "*) PYTHONPATH="$(site)" {python} -c "
import sys, sysconfig
site, sys.argv = sys.argv[1], ['-', *sys.argv[2:]]
sys.path.append(sys.argv[1])
sysconfig.get_paths = lambda: {{'purelib': site}}
exec(sys.stdin.read())" "$(site)" "$3" ;;
    *) exec {python} "$@" ;;
esac
"""
INSTALL = """#!/usr/bin/env bash
site="$1/site"
mkdir -p "$site/torch"
printf 'import nothing' >"$site/torch/__init__.py"
for name in torch-2.13.0 numpy-2 tokenizers-0 minillm_trainer-0; do
    mkdir -p "$site/$name.dist-info"
    echo "$name.dist-info/RECORD,," >"$site/$name.dist-info/RECORD"
done
echo "torch/__init__.py,sha256=x,14" >>"$site/torch-2.13.0.dist-info/RECORD"
"""
UV = """#!/usr/bin/env bash
echo "uv $* links=${UV_FIND_LINKS:-}" >>"$LOG"
case "$1" in
    --version) [ -z "${UV_BROKEN:-}" ] ;;
    venv)
        venv="${@: -1}"
        mkdir -p "$venv/bin"; cp "$(dirname "$0")/python3" "$venv/bin/python"
        touch "$venv/pyvenv.cfg" "$venv/no-pip" ;;
    pip) [ -z "${UV_FAILS:-}" ] || { echo "uv has no answer"; exit 2; }; "$INSTALL" "$(dirname "$4")/.." ;;
esac
"""


class Machine:
    """A repository with scripts/setup.sh and a PATH of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.tools = folder, folder / "the repository", folder / "tools"
        self.log, self.venv = folder / "log", self.root / ".venv"
        (self.root / "scripts").mkdir(parents=True)
        (self.root / "src").mkdir()
        self.tools.mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", self.root / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        self.tool("install", INSTALL)
        self.python = self.tool("python3", PYTHON.format(python=sys.executable))

    def tool(self, name: str, text: str) -> Path:
        path = self.tools / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def __call__(self, extras: str = "track,report,data", cwd: Path | None = None, **variables: str):
        """Runs setup_environment; the result has the lines that the stand-ins logged as `.calls`."""
        self.log.write_text("")
        settings = ("PYTHON", "VENV_DIR", "USE_UV", "PIP_FIND_LINKS")
        known = {name: value for name, value in os.environ.items() if name not in settings}
        path = f"{self.tools}:/usr/bin:/bin"
        stand_ins = {"LOG": str(self.log), "INSTALL": str(self.tools / "install")}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", '. "$0"; setup_environment "$1"; echo "$VENV_PYTHON"',
             str(self.root / "scripts" / "setup.sh"), extras],
            env={**known, "PATH": path, **stand_ins, **variables},
            cwd=cwd or self.folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        done.calls = self.log.read_text().splitlines()  # type: ignore[attr-defined]
        done.installs = [c for c in done.calls if "pip install" in c]  # type: ignore[attr-defined]
        return done


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_a_new_machine_gets_everything_in_one_pip_call_with_torch_pinned(machine):
    done = machine()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(machine.venv / "bin" / "python")
    (install,) = done.installs
    assert "--no-compile" in install and "-c constraints.txt" in install
    assert "torch==2.13.0 -e .[data,report,track]" in install
    assert "creating a new environment" in done.stdout and "ready after" in done.stdout
    assert (machine.venv / "setup.log").is_file()


def test_an_environment_that_is_up_to_date_is_left_alone_at_once(machine):
    machine()
    started = time.monotonic()
    done = machine()
    assert time.monotonic() - started < 2
    assert done.installs == [] and done.stdout.strip() == str(machine.venv / "bin" / "python")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(machine, name):
    machine()
    with open(machine.root / name, "a") as file:
        file.write("\n# changed\n")
    done = machine()
    assert len(done.installs) == 1 and "not up to date" in done.stdout
    assert not any("-m venv" in call for call in done.calls)
    assert machine().installs == []


def test_a_repository_that_moved_is_installed_again(machine):
    machine()
    machine.root = machine.root.rename(machine.folder / "elsewhere")
    assert len(machine().installs) == 1


def test_the_test_environment_also_serves_run_sh_but_not_the_other_way_round(machine):
    machine("dev")
    assert machine("track,report,data").installs == []
    shutil.rmtree(machine.venv)
    machine("track,report,data")
    assert machine("report").installs == []
    done = machine("dev")
    assert "-e .[dev]" in done.installs[0]
    assert machine("track,report,data").installs == []


def test_a_python_that_no_longer_runs_means_building_again(machine):
    machine()
    (machine.venv / "bin" / "python").unlink()
    (machine.venv / "bin" / "python").symlink_to(machine.folder / "uninstalled")
    done = machine()
    assert done.returncode == 0 and "its Python does not run" in done.stdout
    assert machine().installs == []


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_torch_means_building_again(machine, damage):
    machine()
    (machine.venv / "left-over").touch()
    torch = machine.venv / "site" / "torch" / "__init__.py"
    torch.unlink() if damage == "missing" else torch.write_text("raise ImportError")
    done = machine()
    assert done.returncode == 0 and "missing or damaged" in done.stdout
    assert torch.read_text() == "import nothing" and not (machine.venv / "left-over").exists()


def test_a_half_finished_set_up_is_completed_in_place(machine):
    machine()
    (machine.venv / "minillm-setup").unlink()
    done = machine()
    assert "was not finished" in done.stdout and len(done.installs) == 1
    assert not any("-m venv" in call for call in done.calls)


def test_a_set_up_that_pip_cannot_finish_shows_why_and_is_tried_again_next_time(machine):
    done = machine(PIP_FAILS="1")
    assert done.returncode == 1 and "no network today" in done.stderr
    assert machine().returncode == 0


def test_a_folder_that_is_no_environment_is_never_deleted(machine):
    precious = machine.folder / "thesis" / "chapter1.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    done = machine(VENV_DIR=str(precious.parent))
    assert done.returncode == 1 and "is not a virtual environment" in done.stderr
    assert precious.read_text() == "years of work"


def test_venv_dir_may_be_relative_to_the_working_directory_or_absolute(machine):
    (machine.folder / "work").mkdir()
    done = machine(VENV_DIR="env", cwd=machine.folder / "work")
    assert done.stdout.splitlines()[-1] == str(machine.folder / "work" / "env" / "bin" / "python")
    done = machine(VENV_DIR=str(machine.folder / "with space"))
    assert done.returncode == 0 and (machine.folder / "with space" / "minillm-setup").is_file()
    assert not machine.venv.exists()


def test_uv_is_used_when_present_and_is_told_where_pip_looks(machine):
    machine.tool("uv", UV)
    done = machine(PIP_FIND_LINKS="/wheels /more")
    install, *others = done.installs
    assert others == []
    assert install.startswith("uv pip install --python") and "links=/wheels,/more" in install
    assert "-c constraints.txt torch==2.13.0 -e .[data,report,track]" in install
    assert "with uv" in done.stdout
    assert machine().installs == []


def test_use_uv_0_means_pip(machine):
    machine.tool("uv", UV)
    done = machine(USE_UV="0")
    assert not any(call.startswith("uv") for call in done.calls) and len(done.installs) == 1


def test_when_uv_fails_pip_does_the_work_and_it_is_said(machine):
    machine.tool("uv", UV)
    done = machine(UV_FAILS="1")
    assert done.returncode == 0 and "uv failed, falling back to pip" in done.stdout
    assert done.installs[-1].startswith("python -m pip install")


@pytest.mark.parametrize("present", [False, True])
def test_a_uv_that_cannot_run_is_not_used(machine, present):
    if present:
        machine.tool("uv", UV)
    done = machine(USE_UV="1", UV_BROKEN="1")
    assert done.returncode == 0 and "uv is not installed: using pip" in done.stdout


def test_an_impossible_use_uv_is_refused(machine):
    done = machine(USE_UV="maybe")
    assert done.returncode == 1 and "auto, 0 or 1" in done.stderr


OLD = '#!/bin/sh\ncase "$*" in *print*) echo 3.8.1 ;; *) exit 1 ;; esac\n'


def test_a_newer_python_is_found_when_python3_is_too_old(machine):
    machine.python.rename(machine.tools / "python3.12")
    machine.tool("python3", OLD)
    assert machine().returncode == 0


def test_python_chooses_the_interpreter(machine):
    machine.tool("python3", OLD)
    other = machine.tool("my-python", PYTHON.format(python=sys.executable))
    assert machine(PYTHON=str(other)).returncode == 0


@pytest.mark.parametrize("variables", [{}, {"PYTHON": "python3"}])
def test_without_a_suitable_python_it_says_so_and_keeps_what_is_there(machine, variables):
    machine()
    for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3.10", "python3", "python"):
        machine.tool(name, OLD)
    (machine.venv / "bin" / "python").unlink()
    done = machine(**variables)
    assert done.returncode == 1 and "3.10" in done.stderr and "3.8.1" in done.stderr
    assert (machine.venv / "site").is_dir()


# --- options of the scripts themselves ---


def script(name: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *options], env={**os.environ, **variables}, cwd="/",
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("option", ["--smoketest", "--skip-pretrain=1", "data.jsonl", "-x"])
def test_run_sh_refuses_an_unknown_option_before_any_set_up(tmp_path, option):
    done = script("run.sh", "--smoke-test", option, VENV_DIR=str(tmp_path / "venv"))
    assert done.returncode == 1 and done.stdout == ""
    assert option in done.stderr and "usage: scripts/run.sh" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_run_sh_explains_itself_without_set_up(tmp_path, option):
    done = script("run.sh", option, VENV_DIR=str(tmp_path / "venv"))
    assert done.returncode == 0 and done.stderr == ""
    for word in (
        "--smoke-test",
        "--skip-pretrain",
        "--force-pretrain",
        "MODEL_HIDDEN_SIZE",
        "DPO_ARGS",
    ):
        assert word in done.stdout
    assert not (tmp_path / "venv").exists()


def test_test_sh_explains_itself_without_set_up(tmp_path):
    done = script("test.sh", "--help", VENV_DIR=str(tmp_path / "venv"))
    assert done.returncode == 0 and "--all" in done.stdout and "#" not in done.stdout
    assert not (tmp_path / "venv").exists()
