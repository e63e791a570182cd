"""Every reader refuses every damaged or malicious checkpoint with one sentence: exit code 1, no traceback, no code run,
and nothing left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import faults_in_files
import faults_in_folders
import faults_in_models
import pytest
from parts import FAULTS, FOLDERS, PLANTED, RESUMED, Fault, Sound

from minillm.checkpoint.files import save_tensors
from minillm.cli import main

TINY = ["--max_seq_len", "64", "--max_steps", "1", "--batch_size", "1", "--device", "cpu", "--dtype", "float32",
        "--no_wandb", "--out_dir", "out"]  # fmt: skip
# Every command that takes a checkpoint, by the way it reads one. {} is the checkpoint.
READERS = {
    "generate": "generate --checkpoint {} --prompt a --max_new_tokens 1",
    "verify": "checkpoint verify {}",
    "sft": f"sft --data_path talks.jsonl --pretrained_path {{}} {' '.join(TINY)}",
}
OTHERS = {
    "chat": "chat --checkpoint {}",
    "export": "export --checkpoint {} --output made",
    "convert": "convert --checkpoint {} --to diffusion --output made.pt",
    "convert-raw": "convert --input_dir {} --output_dir made",
    "push": "push {} --repo_id someone/small --dry_run",
    "merge": "merge --checkpoint {} --adapter adapter --output made.pt",
    "evaluate": "evaluate --checkpoint {} --data_path talks.jsonl --output made",
    "evaluate-instructions": "evaluate-instructions --checkpoint {} --data_path talks.jsonl --output made",
    "distill": f"distill --data_path talks.jsonl --pretrained_path good.pt --teacher {{}} {' '.join(TINY)}",
    "diff": "checkpoint diff good.pt {}",
    "average": "checkpoint average good.pt {} --output made.pt",
    "compress": "checkpoint compress {}",
    "tag": "checkpoint tag {} --name v1",
    "resume": f"pretrain --data_path texts.jsonl --resume_from {{}} {' '.join(TINY)}",
}
FOLDER_ONLY = {"import": "import {} --output made.pt"}
FILLED_BY = (faults_in_files, faults_in_folders, faults_in_models)  # importing them fills the tables
FEW = ["code_in_an_archive", "the_first_half", "a_changed_byte", "not_a_number", "a_version_from_the_future"]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with data to train on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINILLM_CACHE_DIR", str(tmp_path.parent / "cache"))
    talk = [{"role": "user", "content": "some words"}, {"role": "assistant", "content": "to learn"}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"conversations": talk}) + "\n" for _ in range(8)))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "some words to learn"}) + "\n" for _ in range(8)))
    (tmp_path / "bad").mkdir()
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(fault: Fault, command: str, sound: Sound, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = fault.make(sound, place / "bad")
    before = tree(place)
    capsys.readouterr()
    code = main([word.replace("{}", str(bad)) for word in command.split()])
    said = capsys.readouterr()
    assert code == 1, said.err
    assert re.search(fault.says, said.out + said.err), said.out + said.err
    assert said.err.rstrip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said.err
    assert not (place / PLANTED).exists(), "code was executed"
    assert tree(place) == before


def test_what_is_made_of_sound_parts_is_read(sound: Sound, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a refusal below is for the fault and nothing else."""
    save_tensors(place / "good.pt", sound.content())
    folder = sound.model_folder(place)
    for path in ("good.pt", str(folder)):
        for name in ("generate", "verify"):
            assert main([word.replace("{}", path) for word in READERS[name].split()]) == 0, capsys.readouterr()


def test_there_are_at_least_forty() -> None:
    assert len(FAULTS) >= 40 and FOLDERS and RESUMED


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused(
    name: str, reader: str, sound: Sound, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(FAULTS[name], READERS[reader], sound, place, capsys)


@pytest.mark.parametrize("reader", ["generate", "sft", "import"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_lies_is_refused(
    name: str, reader: str, sound: Sound, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(FOLDERS[name], {**READERS, **OTHERS, **FOLDER_ONLY}[reader], sound, place, capsys)


@pytest.mark.parametrize("reader", ["resume", "verify"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_that_is_not_whole_is_not_resumed(
    name: str, reader: str, sound: Sound, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(RESUMED[name], {**READERS, **OTHERS, **FOLDER_ONLY}[reader], sound, place, capsys)


# These read no values: they show and keep what is there, or leave a full checkpoint to others.
BLIND = ("diff", "compress", "convert-raw")


@pytest.mark.parametrize(
    "name, reader",
    [(name, reader) for name in FEW for reader in OTHERS if name != "not_a_number" or reader not in BLIND],
)
def test_every_command_refuses(
    name: str, reader: str, sound: Sound, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tensors(place / "good.pt", sound.content())
    refused(FAULTS[name], OTHERS[reader], sound, place, capsys)
