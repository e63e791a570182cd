"""`minillm push` and `minillm pull` against a hub on 127.0.0.1 (hub_stub.py). Nothing leaves this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_stub import OWNER, READS, WRITES, Hub, running_hub
from tiny import random_model, saved, tiny_config
from training import environment

from minillm.convert.card import split_card, with_metadata
from minillm.convert.hub import PushSettings, push
from minillm.log import UserError

REPO = f"{OWNER}/miller"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as stub:
        yield stub


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder as an export leaves it, with files beside that are nobody's business."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(os.urandom(2000 + number))
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A miller\n", encoding="utf-8")
    (folder / "training_log.json").write_text('["/home/me/data"]')
    (folder / "optimizer.pt").write_bytes(b"pickle")
    return folder


def variables(hub: Hub, home: Path, token: str) -> dict[str, str]:
    """What the client sees. A request to anywhere else goes to a proxy that nobody runs."""
    return {
        **environment(), "HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1",
        "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",  # other tests set it
    }  # fmt: skip


def minillm(hub: Hub, home: Path, *words: str | Path, token: str = WRITES) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minillm", *map(str, words)],
        env=variables(hub, home, token), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_what_was_pushed_is_pulled_byte_for_byte_and_a_second_push_sends_nothing(
    hub: Hub, exported: Path, tmp_path: Path
) -> None:
    done = minillm(hub, tmp_path, "push", exported, "--repo_id", REPO, "--license", "mit", "--language", "en", "zh")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO]
    assert repository.private and len(repository.messages) == 1
    assert "(private): 5 files sent" in done.stderr and WRITES not in done.stdout + done.stderr
    assert "not sent, unless --include names it: optimizer.pt, training_log.json" in done.stderr

    again = minillm(hub, tmp_path, "push", exported, "--repo_id", REPO, "--license", "mit", "--language", "en", "zh")
    assert again.returncode == 0, again.stderr
    assert "0 files sent, 5 were there" in again.stderr and "not sent again: config.json, model-00001" in again.stderr
    assert len(hub.uploads) == 2 and len(repository.messages) == 1

    pulled = minillm(hub, tmp_path, "pull", REPO, "--output", tmp_path / "pulled")
    assert pulled.returncode == 0, pulled.stderr
    contents = {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()}
    card = contents.pop("README.md").decode()
    assert contents == {name: (exported / name).read_bytes() for name in contents} and len(contents) == 4
    assert split_card(card)[0] == {"library_name": "transformers", "license": "mit", "language": ["en", "zh"]}
    assert card.endswith("# A miller\n")

    hub.address = "http://127.0.0.1:9"  # what was fetched before is no answer to what is there now
    gone = minillm(hub, tmp_path, "pull", REPO, "--output", tmp_path / "again")
    assert gone.returncode == 1 and "cannot be reached" in gone.stderr and not (tmp_path / "again").exists()
    full = minillm(hub, tmp_path, "pull", REPO, "--output", exported)
    assert full.returncode == 1 and "is not empty" in full.stderr and (exported / "optimizer.pt").is_file()


def test_an_interrupted_push_goes_on_where_it_was(hub: Hub, exported: Path, tmp_path: Path) -> None:
    hub.stall_after = 1
    words = ["push", str(exported), "--repo_id", REPO, "--revision", "trial", "--public"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minillm", *words], env=variables(hub, tmp_path, WRITES), stderr=subprocess.DEVNULL
    )
    assert hub.stalled.wait(30) and len(hub.uploads) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not hub.repositories[REPO].branches["trial"]  # no half of a model

    hub.stall_after = None
    done = minillm(hub, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert len(hub.uploads) == len(set(hub.uploads)) == 2  # the first one was not sent again
    assert len(hub.repositories[REPO].branches["trial"]) == 5 and not hub.repositories[REPO].branches["main"]
    assert not hub.repositories[REPO].private

    other = minillm(hub, tmp_path, "pull", REPO, "--output", tmp_path / "x", "--revision", "nowhere")
    assert other.returncode == 1 and "has no revision nowhere" in other.stderr


@pytest.mark.parametrize(
    ("words", "token", "said"),
    [
        (["push", "--repo_id", REPO], "hf_wrong", "the hub does not accept the token in HF_TOKEN"),
        (["push", "--repo_id", REPO], READS, "may not do this to somebody/miller"),
        (["push", "--repo_id", REPO], "", "needs a token that may write, in the environment variable HF_TOKEN"),
        (["pull", "somebody/nothing"], WRITES, "the hub has no repository somebody/nothing"),
    ],
    ids=["wrong token", "token that only reads", "no token", "missing repository"],
)
def test_a_refusal_is_one_sentence(
    hub: Hub, exported: Path, tmp_path: Path, words: list[str], token: str, said: str
) -> None:
    more = [str(exported)] if words[0] == "push" else ["--output", str(tmp_path / "pulled")]
    done = minillm(hub, tmp_path, *words, *more, token=token)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not token or token not in done.stdout + done.stderr
    assert not (tmp_path / "pulled").exists() and not hub.repositories


def test_a_hub_that_cannot_be_reached_is_said(exported: Path, tmp_path: Path) -> None:
    nobody = Hub()
    nobody.address = "http://127.0.0.1:9"
    done = minillm(nobody, tmp_path, "push", exported, "--repo_id", REPO)
    assert done.returncode == 1
    assert "the hub (http://127.0.0.1:9) cannot be reached" in done.stderr.splitlines()[-1]


def test_a_dry_run_lists_what_would_be_sent_and_needs_neither_network_nor_token(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it went to the network"))
    push(PushSettings(
        source=str(exported), repo_id=REPO, dry_run=True, include=("training_*.json",), base_model="Qwen/Qwen3-0.6B",
        datasets=("roneneldan/TinyStories",),
    ))  # fmt: skip
    said = capsys.readouterr().out
    assert "2.0 KB  model-00001-of-00002.safetensors" in said and "training_log.json" in said
    assert "optimizer.pt" not in said and "base_model: Qwen/Qwen3-0.6B" in said and "- roneneldan/TinyStories" in said


def test_a_run_folder_is_exported_and_its_card_says_what_is_known_and_no_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "pretrain_16"
    run.mkdir()
    (run / "README.md").write_text("trained on /home/me/data")
    (run / "training_log.json").write_text("[]")
    saved(
        run / "best_model.pt", random_model(tiny_config(vocab_size=6400)), stage="full_sft", architecture="ar",
        global_step=70, best_validation_loss=1.23456, optimizer_state_dict={"adamw": {}},
        data_state={"description": "100 conversations"}, training_stats={"tokens_seen": 5000},
        parent={"path": "/home/me/out/pretrain_16.pth", "sha256": "ab" * 32, "stage": "pretrain", "step": 9},
        imported={"repo_id": "Qwen/Qwen3-0.6B"},
    )  # fmt: skip
    push(PushSettings(source=str(run), repo_id=REPO, dry_run=True, no_check=True, include=("training_log.json",)))
    listed, card = capsys.readouterr().out.split("\n\n", 1)
    names = {line.split()[-1] for line in listed.splitlines()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "training_log.json"} <= names
    assert not [name for name in names if name.endswith(".pt")]
    metadata, text = split_card(card)
    measured = metadata["model-index"][0]["results"][0]["metrics"][0]
    assert measured["value"] == 1.2346 and metadata["base_model"] == "Qwen/Qwen3-0.6B" and "license" not in metadata
    for known in ("# pretrain_16", "| stage | full_sft |", "| steps | 70 |", "| trained on | 100 conversations |",
                  "| tokens seen | 5,000 |", "(SHA-256 abababababab)", f"from_pretrained('{REPO}')"):  # fmt: skip
        assert known in text
    assert "/home" not in card and str(tmp_path) not in card


def test_what_cannot_be_pushed_is_refused(exported: Path, tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises(UserError) as error:
            push(PushSettings(**{"source": str(exported), "repo_id": REPO, "dry_run": True, **changes}))  # type: ignore[arg-type]
        return str(error.value)

    assert "give OWNER/NAME" in refused(repo_id="miller")
    assert "give OWNER/NAME" in refused(repo_id="a/b/c")
    assert "there is no folder or checkpoint" in refused(source=str(tmp_path / "nothing"))
    assert "--include *.txt: there is no such file" in refused(include=("*.txt",))
    for path in exported.glob("*.safetensors"):
        path.unlink()
    assert "has no .safetensors or .gguf file" in refused()
    (exported / "README.md").write_text("---\na: [\n---\n")
    (exported / "model.gguf").write_bytes(b"GGUF")
    assert "is not YAML" in refused()


def test_metadata_is_merged_into_a_card_and_its_text_stays() -> None:
    card = with_metadata("---\nlicense: mit\ntags: [a]\n---\n\n# Name\n\n---\n\nmore\n", {"license": "apache-2.0"})
    assert split_card(card) == ({"license": "apache-2.0", "tags": ["a"]}, "# Name\n\n---\n\nmore\n")
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert with_metadata("# Name\n", {}) == "# Name\n"
