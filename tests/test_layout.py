"""The house keeps its order: imports point downwards, importing does nothing, help needs no torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "minillm"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent.name != "remote_code"  # it is shipped with exports and imports transformers
}
MOST_LINES = 500

# What each part may import, besides itself, log, config, stages and atomic. Imports inside functions count as well.
MODEL_SIDE = {"models", "families", "methods"}
BELOW: dict[str, set[str]] = {
    "log": set(),
    "atomic": set(),
    "config": set(),
    "lock": set(),
    "stages": set(),
    "commands": set(),
    "rendezvous": set(),
    "processes": {"rendezvous"},
    "remote": set(),
    "models": {"processes"},
    "text": set(),
    "families": {"models"},
    "methods": {"models", "families", "processes"},
    "data": {"text", "remote", "lock"},
    "checkpoint": {"models", "text", "processes"},
    "convert": {"models", "families", "text", "checkpoint", "data"},
    "manage": {"models", "text", "checkpoint"},
    "rollout": {"models", "families", "text", "checkpoint", "convert", "remote"},
    "train": MODEL_SIDE | {"text", "data", "checkpoint", "convert", "rollout", "processes", "lock"},
    "serve": MODEL_SIDE | {"text", "checkpoint", "convert"},
    "eval": MODEL_SIDE | {"text", "data", "checkpoint", "convert", "train", "commands", "rollout"},
}
BELOW["pipeline"] = BELOW["compare"] = {*BELOW}
BELOW["cli"] = {*BELOW}
BELOW["__main__"] = {"cli"}
# `minillm data train-tokenizer` is backed by text.train and reads its corpus through data, inside functions.
EXCEPTIONS = {("minillm.text.train", "data")}


def imported(path: Path) -> set[str]:
    """Full names of our own modules (or attributes of them) that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("minillm.")}


def part(name: str) -> str:
    """minillm.train.loop -> train"""
    return name.split(".")[1]


def test_every_part_of_the_package_has_its_place() -> None:
    assert {part(name) for name in MODULES if name != "minillm"} == set(BELOW)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "minillm"])
def test_imports_point_downwards(name: str) -> None:
    own = part(name)
    allowed = BELOW[own] | {own, "log", "config", "stages", "atomic", "__version__"}
    if own == "log":
        allowed = {"log"}
    if own == "config":
        allowed = {"config", "log"}
    wrong = {part(other) for other in imported(MODULES[name])} - allowed
    assert not {other for other in wrong if (name, other) not in EXCEPTIONS}


def test_the_exceptions_are_needed_and_are_taken_inside_functions() -> None:
    for name, other in EXCEPTIONS:
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
        assert not any(module.startswith(f"minillm.{other}") for module in top)
        assert other in {part(found) for found in imported(MODULES[name])}


@pytest.mark.parametrize("name", MODULES)
def test_files_stay_short(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def run_python(program: str, *arguments: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=variables, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_and_all_help_need_no_torch() -> None:
    program = """
import sys
from minillm.cli import COMMANDS, execute
assert "torch" not in sys.modules, "import minillm.cli"
for name in COMMANDS:
    try:
        execute([*name.split(), "--help"])
    except SystemExit:
        pass
    assert "torch" not in sys.modules, name
"""
    run_python(program)


def test_importing_touches_neither_network_nor_disk() -> None:
    program = """
import sys
from importlib import import_module
import torch, numpy, tokenizers, orjson, jinja2, rich, yaml  # what they do is theirs
import torch.utils.data
WATCHED = ("socket.", "subprocess.", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.truncate")
seen = []
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event.startswith(WATCHED):
        seen.append((event, str(arguments)))
sys.addaudithook(watch)
for name in sys.argv[1:]:
    import_module(name)
    assert not seen, (name, seen)
"""
    run_python(program, *(name for name in MODULES if name != "minillm.__main__"))
