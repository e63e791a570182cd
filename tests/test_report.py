"""The report: numbers come from the run folders, and everything it promises is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from minillm.eval import report
from minillm.eval.report import StageResult, read_curves, table_row, text_table, write_report

METRICS = """step,train/loss,train/tokens_per_sec,val/accuracy,val/loss,val/perplexity
0,,,0.01,8.5,4914.7
5,7.0,600,,,
10,6.0,700,0.20,5.5,244.69
15,5.0,800,,,
20,4.5,700,0.25,4.0,54.6
30,4.0,700,0.24,4.5,90.02
"""
DPO_METRICS = """step,train/loss,train/tokens_per_sec,val/loss,val/perplexity,val/rewards_accuracies
0,,,0.6931,,0
4,0.65,300,0.61,,0.75
"""
GENERATE = """
import sys
prompt = sys.argv[sys.argv.index("--prompt") + 1]
if "8 + 7" in prompt:
    sys.exit("no such luck")
sys.stdout.buffer.write(("我回答：" + prompt).encode())
"""


def stage(folder: Path, name: str, metrics: str, seconds: float | None = 90.0) -> StageResult:
    run_folder = folder / f"{name}_64"
    run_folder.mkdir(parents=True)
    (run_folder / "metrics.csv").write_text(metrics, encoding="utf-8")
    return StageResult(name, folder / f"{name}_64.pth", run_folder, seconds=seconds, command=f"minillm {name}")


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    script = tmp_path / "generate.py"
    script.write_text(GENERATE, encoding="utf-8")
    return (sys.executable, str(script))


def test_a_row_shows_the_best_evaluation_because_that_checkpoint_is_handed_on(tmp_path):
    row = table_row(stage(tmp_path, "pretrain", METRICS))
    assert row[:6] == ("pretrain", "8.5000 → 4.0000", "54.60", "25.0 %", "700", "1.5")
    assert row[6].endswith("pretrain_64.pth")


def test_preference_tuning_has_a_reward_accuracy_and_no_perplexity(tmp_path):
    assert table_row(stage(tmp_path, "rlhf", DPO_METRICS))[1:4] == ("0.6931 → 0.6100", "–", "75.0 % (reward)")


def test_a_checkpoint_that_was_found_shows_its_evaluation_and_no_speed(tmp_path):
    measured = {"loss": 3.25, "perplexity": 25.79, "accuracy": 0.4}
    row = table_row(StageResult("pretrain", tmp_path / "pretrain_64.pth", None, evaluation=measured))
    assert row[:6] == ("pretrain (found)", "– → 3.2500", "25.79", "40.0 %", "–", "–")


def test_a_run_without_metrics_gives_blanks_instead_of_failing(tmp_path):
    result = StageResult("full_sft", tmp_path / "x.pth", tmp_path / "nowhere", seconds=6.0)
    assert table_row(result)[1:6] == ("– → –", "–", "–", "–", "0.1")


def test_curves_have_their_own_steps(tmp_path):
    curves = read_curves(stage(tmp_path, "pretrain", METRICS).run_folder, "pretrain")
    assert curves.training == [(5, 7.0), (10, 6.0), (15, 5.0), (20, 4.5), (30, 4.0)]
    assert curves.validation == [(0, 8.5), (10, 5.5), (20, 4.0), (30, 4.5)]


def test_the_terminal_table_is_aligned(tmp_path):
    lines = text_table([table_row(stage(tmp_path, "pretrain", METRICS))]).splitlines()
    assert len(lines) == 3
    assert lines[0].index("checkpoint") == lines[2].index(str(tmp_path)[:5])
    assert lines[0].startswith("stage") and lines[2].startswith("pretrain")


def test_the_report_has_table_samples_curves_environment_and_commands(tmp_path, program, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = [stage(tmp_path / "out", "pretrain", METRICS), stage(tmp_path / "out", "rlhf", DPO_METRICS)]
    path = write_report(results, tmp_path / "out", run=program, remarks=["Estimated 1m, took 2m."])
    text = path.read_text(encoding="utf-8")

    assert path == tmp_path / "out" / "report.md"
    assert "| pretrain | 8.5000 → 4.0000 | 54.60 | 25.0 % | 700 | 1.5 | out/pretrain_64.pth |" in text
    assert "Estimated 1m, took 2m." in text
    assert "我回答：你是谁？" in text
    assert "(generation failed: no such luck)" in text
    assert "Python 3" in text and "CPU cores" in text and "torch " in text
    assert "minillm pretrain\nminillm rlhf" in text
    for name in ("pretrain", "rlhf"):
        assert f"(loss_{name}.png)" in text
        assert (tmp_path / "out" / f"loss_{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "8.5000 → 4.0000" in printed and "我回答：你是谁？" in printed and "out/report.md" in printed


def test_a_pretrained_model_continues_texts_and_a_chat_model_answers(tmp_path, program):
    checkpoint = tmp_path / "x.pth"
    base = report.generate_samples(StageResult("pretrain", checkpoint, None), program, 8)
    chat = report.generate_samples(StageResult("full_sft", checkpoint, None), program, 8)
    assert [s.prompt for s in base] == [prompt for _, prompt in report.TEXT_PROMPTS]
    assert [s.prompt for s in chat] == [prompt for _, prompt in report.CHAT_PROMPTS]
    assert len(chat) == 3 and chat[1].text == "我回答：你是谁？"


def test_code_fences_in_a_sample_cannot_end_its_block():
    assert report._fenced("a ``` b").startswith("````text\n")
