"""The documentation is true: its commands run as written, its links lead somewhere, its file tree is the real one.

A block that opens with ```bash is run. One that opens with ```bash notest is not, and says why in a comment on
its first line. The blocks of one page run in order, in one shell, in a copy of the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nursery import Nursery

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```bash([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MARGIN_S = 280


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(what follows `bash` on the opening line, commands) of every block."""
    return [(mark.strip(), text) for mark, text in BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> list[str]:
    """The blocks that are run, without comments: a translation has the same."""
    return [re.sub(r"^\s*#.*\n|\s+# .*$", "", text, flags=re.MULTILINE) for mark, text in blocks(page) if not mark]


def english(page: Path) -> Path:
    """The page that a translation translates; itself for an original."""
    return page.with_name(page.name.replace(".zh.md", ".md"))


TRANSLATIONS = [page for page in PAGES if english(page) != page]
RUN = [
    page for page in PAGES if commands(page) and (english(page) == page or commands(page) != commands(english(page)))
]


def copy_repository(target: Path) -> None:
    """What a commit of the working tree would hold, without what earlier runs left here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:  # an unpacked archive
        left_out = shutil.ignore_patterns(".*", "out", "processed", "final", "tf_dir", "wandb", "build", "__pycache__")
        shutil.copytree(ROOT, target, ignore=left_out)
        return
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def shell_environment(copy: Path, folder: Path, python: str) -> dict[str, str]:
    """Offline, with `minillm`, `python` and `torchrun` as after installing the copy."""
    folder.mkdir()
    commands = {
        "python": f'"{python}"',
        "minillm": f'"{python}" -m minillm',
        "torchrun": f'"{sys.executable}" -m torch.distributed.run',
    }
    for name, words in commands.items():
        shim = folder / name
        shim.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        shim.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MINILLM_", "PYTEST_"))}
    return {
        **variables,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(copy / "src"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }


def run_as_written(page: Path, folder: Path, python: str) -> None:
    copy = folder / "minillm"
    copy_repository(copy)
    script = "set -eo pipefail\n" + "".join(text for mark, text in blocks(page) if not mark)
    done = subprocess.run(
        ["bash", "-xc", script], cwd=copy, env=shell_environment(copy, folder / "bin", python),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        timeout=MARGIN_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{name_of(page)}:\n" + "\n".join(done.stdout.splitlines()[-30:])


# The README's commands are processes of their own, those of the other pages come from the nursery: it saves each of
# them the seconds that importing torch takes. With --all they are processes of their own, too.
FROM_NURSERY = [page for page in RUN if page.name != "README.md"]


@pytest.mark.parametrize("page", FROM_NURSERY, ids=name_of)
def test_the_commands_of_a_page_run_as_written(page: Path, tmp_path: Path, nursery: Nursery) -> None:
    run_as_written(page, tmp_path, str(nursery.python))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *(pytest.param(page, marks=pytest.mark.slow) for page in FROM_NURSERY)], ids=name_of
)
def test_the_commands_of_a_page_run_as_written_in_processes_of_their_own(page: Path, tmp_path: Path) -> None:
    run_as_written(page, tmp_path, sys.executable)


@pytest.mark.parametrize("page", TRANSLATIONS, ids=name_of)
def test_a_translation_has_the_commands_of_the_original(page: Path) -> None:
    assert commands(page) == commands(english(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    for mark, text in blocks(page):
        assert mark in ("", "notest")
        assert not mark or text.startswith("# ")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    without_code = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(without_code):
        if not link.startswith(("http://", "https://", "mailto:", "#")):
            assert (page.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "README.zh.md"], ids=name_of)
def test_the_file_tree_names_the_folders_that_exist(page: Path) -> None:
    tree = re.search(r"^```text\n(.*?^src/minillm/.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert tree, "the README shows a tree with src/minillm/"
    before, inside = re.split(r"^src/minillm/.*\n", tree[1], flags=re.MULTILINE)
    folders = set(re.findall(r"^  (\w+)/", inside, re.MULTILINE))
    package = ROOT / "src" / "minillm"
    assert folders == {path.name for path in package.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    outside = re.findall(r"^([\w.]+)/", before + inside, re.MULTILINE)
    assert outside
    for folder in outside:
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_no_page_names_a_path_of_somebodys_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w./])/(work|tmp|home|root|Users)/", page.read_text(encoding="utf-8"))
