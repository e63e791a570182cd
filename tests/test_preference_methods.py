"""DPO's relatives and KTO as methods: what they compare, what they keep, what they log, in every family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import CPU, END, START, belief, diffusion
from tiny import random_model, tiny_config
from training import TINY, equal, load

from minillm.checkpoint.files import hash_file
from minillm.cli import main
from minillm.data.batches import Batch, PairBatch
from minillm.data.feedback import LabelBatch, LabelledAnswers, open_feedback
from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Noise, TokenBatch
from minillm.methods.dpo import LOSSES, DirectPreference
from minillm.methods.kto import KahnemanTversky
from minillm.methods.preference_losses import ipo_loss, kto_loss, orpo_loss, simpo_loss
from minillm.methods.reference import WithReference
from minillm.methods.settings import PREFERENCE_LOSSES, PreferenceSettings
from minillm.models.transformer import LanguageModel
from minillm.text.tokenizer import Tokenizer
from minillm.train.optim import clip_gradients

FAMILIES = {"ar": Autoregressive(), "diffusion": diffusion(), "sdd": belief()}
AR = FAMILIES["ar"]


def model_of(name: str, seed: int, **changes: Any) -> LanguageModel:
    family = FAMILIES[name]
    return random_model(tiny_config(causal=family.causal, denoiser=family.denoiser, **changes), seed)


def side(first: int, rows: int = 4, seed: int = 0) -> Batch:
    """Prompts of four tokens, answers of three to five, then padding."""
    random = np.random.default_rng(seed)
    tokens, mask = np.zeros((rows, 12), np.int64), np.zeros((rows, 12), bool)
    for row in range(rows):
        length = 4 + 3 + (row + first) % 3
        tokens[row, :length] = [START, *random.integers(5, 50, length - 2), END]
        mask[row, 4:length] = True
    segments = np.where(tokens > 0, 0, -1).astype(np.int32)
    return Batch(tokens, mask, None, segments, np.arange(rows))


PAIRS = PairBatch(side(0, seed=1), side(1, seed=2))
LABELS = LabelBatch(side(0, seed=1), np.array([True, False, False, True]), side(1, seed=2))


def method_of(family: str, loss: str, reference: LanguageModel | None, **flags: Any) -> WithReference:
    kind = KahnemanTversky if loss == "kto" else DirectPreference
    return kind(FAMILIES[family], reference, PreferenceSettings(loss=loss, **flags), seed=0)


def batch_of(loss: str) -> PairBatch | LabelBatch:
    return LABELS if loss == "kto" else PAIRS


def means(method: WithReference, model: LanguageModel, batch: Any, step: int = 0) -> dict[str, float]:
    metrics = method.loss(model, method.prepare(model, batch, CPU, step, 0).data).metrics
    return {name: float(total.detach()) / count for name, (total, count) in metrics.items() if count}


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_loss_teaches_every_family_what_is_wanted(family: str, loss: str, experts: bool) -> None:
    """One small step down the gradient lowers the loss, and the chosen answers gain on the rejected ones."""
    policy, reference = (model_of(family, 0, use_moe=experts) for _ in range(2))
    method = method_of(family, loss, reference)
    prepared = method.prepare(policy, batch_of(loss), CPU, 0, 0)
    before = method.loss(policy, prepared.data)
    before.loss.backward()
    assert prepared.count == 4 and all(parameter.grad is None for parameter in reference.parameters())
    norm = clip_gradients(policy.parameters(), 0.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 / norm * parameter.grad
    after = method.loss(policy, prepared.data)
    assert after.loss < before.loss

    def gap(metrics: Any) -> float:
        chosen, rejected = (float(metrics[f"rewards/{name}"][0]) for name in ("chosen", "rejected"))
        return chosen - rejected

    assert gap(after.metrics) > gap(before.metrics)


def scores(model: LanguageModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of answers, and their tokens, one row at a time."""
    totals = []
    for tokens, mask in zip(torch.from_numpy(batch.tokens), torch.from_numpy(batch.loss_mask), strict=True):
        length = int(mask.nonzero().max()) + 1
        log_probs = model.logits(model(tokens[None, :length]).hidden)[0].log_softmax(-1)
        totals.append(log_probs[:-1].gather(1, tokens[1:length, None])[mask[1:length]].sum())
    return torch.stack(totals).detach(), torch.from_numpy(batch.loss_mask.sum(1))


def test_ipo_simpo_and_orpo_divide_by_the_answer_s_length() -> None:
    policy, reference = model_of("ar", 0), model_of("ar", 1)
    (chosen, long), (rejected, short) = (scores(policy, each) for each in (PAIRS.chosen, PAIRS.rejected))
    chosen_ratio, rejected_ratio = (
        score - scores(reference, each)[0]
        for score, each in ((chosen, PAIRS.chosen), (rejected, PAIRS.rejected))
    )  # fmt: skip
    assert long.tolist() != short.tolist()
    wanted = {
        "ipo": ipo_loss(chosen_ratio / long, rejected_ratio / short, 0.1),
        "simpo": simpo_loss(chosen / long, rejected / short, 2.0, 1.0),
        "orpo": orpo_loss(chosen / long, rejected / short, 0.1),
    }
    for loss, expected in wanted.items():
        found = means(method_of("ar", loss, reference), policy, PAIRS)
        assert found["loss"] == pytest.approx(expected.mean().item(), rel=1e-3), loss
        assert found["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-3)
        assert found["logps/chosen_per_token"] == pytest.approx((chosen / long).mean().item(), rel=1e-3)


def test_losses_without_a_reference_ask_none_and_keep_none() -> None:
    for loss in (*LOSSES, "kto"):
        flags = PreferenceSettings(loss=loss)
        assert flags.needs_reference == (loss not in ("simpo", "orpo"))
    assert method_of("ar", "simpo", None).frozen() == {} and method_of("ar", "orpo", None).frozen() == {}
    assert means(method_of("ar", "orpo", None), model_of("ar", 0), PAIRS)["loss"] > 0


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_about_validation_rows_the_reference_is_asked_once(family: str, loss: str) -> None:
    policy, reference, batch = model_of(family, 1), model_of(family, 2), batch_of(loss)
    method, asked = method_of(family, loss, reference), []
    reference.register_forward_hook(lambda *_: asked.append(1))
    first, questions = means(method, policy, batch, step=-1), len(asked)
    assert questions > 0
    assert means(method, policy, batch, step=-1) == first and len(asked) == questions
    fresh = means(method_of(family, loss, reference), policy, batch, step=-1)
    assert fresh == first and len(asked) == 2 * questions
    means(method, policy, batch, step=5)
    assert len(asked) > 2 * questions  # the noise of a training step is its own


def test_kto_s_baseline_is_the_mean_log_ratio_of_mismatched_answers_of_the_whole_step() -> None:
    policy, reference = model_of("ar", 0), model_of("ar", 1)
    mismatched = scores(policy, LABELS.mismatched)[0] - scores(reference, LABELS.mismatched)[0]
    expected = max(0.0, mismatched.mean().item())
    ratio = scores(policy, LABELS.answers)[0] - scores(reference, LABELS.answers)[0]
    wanted = torch.from_numpy(LABELS.labels)
    losses = kto_loss(ratio, wanted, torch.tensor(expected), 0.1, 1.3, 0.8)

    method = method_of("ar", "kto", reference, desirable_weight=1.3, undesirable_weight=0.8)
    found = means(method, policy, LABELS)
    assert expected > 0 and found["kl"] == pytest.approx(expected, rel=1e-3)
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-3)
    assert found["rewards/chosen"] == pytest.approx(0.1 * ratio[wanted].mean().item(), rel=1e-3)
    assert found["rewards/rejected"] == pytest.approx(0.1 * ratio[~wanted].mean().item(), rel=1e-3)

    # The same step in pieces of one row, all prepared before the first loss, as the loop does.
    def piece(batch: Batch, row: int) -> Batch:
        values = (getattr(batch, name)[row : row + 1] for name in ("tokens", "loss_mask", "segments", "sample_ids"))
        tokens, mask, segments, ids = values
        return Batch(tokens, mask, None, segments, ids)

    rows = [
        LabelBatch(piece(LABELS.answers, row), LABELS.labels[row : row + 1], piece(LABELS.mismatched, row))
        for row in range(4)
    ]
    parts = [method.prepare(policy, each, CPU, 1, 4 + row) for row, each in enumerate(rows)]
    total = sum(method.loss(policy, part.data).loss.item() for part in parts)
    assert total == pytest.approx(losses.sum().item(), rel=1e-3)


def test_kto_s_baseline_is_never_negative_and_begins_anew_with_each_step() -> None:
    policy, reference = model_of("ar", 1), model_of("ar", 0)  # the other way round: a negative estimate
    method = method_of("ar", "kto", reference)
    assert means(method, policy, LABELS, step=0)["kl"] == 0
    assert means(method, reference, LABELS, step=1)["kl"] == 0
    other = method_of("ar", "kto", policy)
    first, second = (means(other, reference, LABELS, step=step)["kl"] for step in (-1, -1))
    assert first == second > 0


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_mismatched_answers_belong_to_other_prompts(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {n // 2}?", "completion": f"Answer {n} " * (1 + n % 3), "label": n % 2 == 0}
        for n in range(40)
    ]
    tokenizer = Tokenizer.load()
    data = open_feedback("labels", write(tmp_path / "a.jsonl", rows), tokenizer, max_seq_len=48, hide_padding=True)
    assert isinstance(data, LabelledAnswers)
    batch = data.rows(np.arange(40))

    def text(each: Batch, row: int, trained: bool) -> str:
        kept = each.loss_mask[row] if trained else ~each.loss_mask[row] & (each.segments[row] >= 0)  # type: ignore[index]
        return tokenizer.decode(each.tokens[row][kept].tolist())

    others = set()
    for row in range(40):
        assert text(batch.answers, row, trained=False).startswith(text(batch.mismatched, row, trained=False)[:12])
        answer = text(batch.mismatched, row, trained=True)
        number = int(answer.split()[1])
        assert number // 2 != row // 2 and answer == text(batch.answers, number, trained=True)
        others.add(number)
    assert len(others) > 20
    again = data.rows(np.array([7]))
    assert np.array_equal(again.mismatched.tokens[0][:16], batch.mismatched.tokens[7][:16])


def demo_labels(demo_data: Path, folder: Path) -> tuple[Path, Path]:
    """The demo's pairs as labelled answers."""
    paths = []
    for name in ("dpo", "dpo_val"):
        pairs = read(demo_data / f"{name}.jsonl")
        rows = [
            {"messages": pair[name], "label": name == "chosen"} for pair in pairs for name in ("chosen", "rejected")
        ]
        paths.append(write(folder / f"{name}.kto.jsonl", rows))
    return paths[0], paths[1]


def train(demo_data: Path, out: Path, *flags: str, loss: str = "sigmoid") -> Path:
    """A few steps from random weights; the run folder."""
    out.mkdir(parents=True, exist_ok=True)
    data, held_out = demo_data / "dpo.jsonl", demo_data / "dpo_val.jsonl"
    if loss == "kto":
        data, held_out = demo_labels(demo_data, out)
    code = main(
        ["dpo", "--loss", loss, "--data_path", str(data), "--validation_data", str(held_out), "--out_dir", str(out),
         *TINY, "--save_every", "3", "--eval_every", "3", "--num_hidden_layers", "1", "--learning_rate", "1e-3", *flags]
    )  # fmt: skip
    assert code == 0
    return next(path for path in out.iterdir() if path.is_dir() and "rlhf" in path.name and "." not in path.name)


def test_a_resumed_kto_run_is_the_same_run_and_its_reference_is_kept(demo_data: Path, tmp_path: Path) -> None:
    flags = ("--max_steps", "6")
    one = train(demo_data, tmp_path / "one", *flags, loss="kto")
    assert (one / "reference.pth").exists() and not (one / "reference_logps.pth").exists()
    two = tmp_path / "two" / one.name
    (tmp_path / "two").mkdir()
    one.rename(two)
    first = load(two / "last.pt")
    for name in ("last.pt", "best_model.pt", "step_000006.pt"):
        (two / name).unlink(missing_ok=True)
    train(demo_data, tmp_path / "two", *flags, "--resume_from", "auto", loss="kto")
    second = load(two / "last.pt")
    assert first["progress"]["step"] == second["progress"]["step"] == 6
    for key in ("model_state_dict", "optimizer_state_dict", "rng_state"):
        assert equal(first[key], second[key]), key
    columns = (two / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {"kl", "rewards/chosen", "rewards/rejected", "logps/chosen_per_token", "val/kl"} <= {
        column.replace("train/kl", "kl") for column in columns
    }


def test_a_run_without_a_reference_leaves_none_behind(demo_data: Path, tmp_path: Path) -> None:
    folder = train(demo_data, tmp_path, "--max_steps", "2", loss="simpo")
    assert not (folder / "reference.pth").exists()
    assert load(folder / "last.pt")["method_state"]["frozen_sha256"] == {}


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_an_epoch_is_the_same_bit_for_bit_whether_the_reference_was_asked_before(
    loss: str, demo_data: Path, tmp_path: Path
) -> None:
    ends = []
    for mode in ("off", "on"):
        folder = train(demo_data, tmp_path / mode, "--max_steps", "5", "--precompute_reference", mode, loss=loss)
        assert (folder / "reference_logps.pth").exists() == (mode == "on")
        ends.append(load(folder / "last.pt"))
    assert ends[0]["data_state"]["position"] <= ends[0]["data_state"]["rows"]
    assert equal(ends[0]["model_state_dict"], ends[1]["model_state_dict"])


def test_with_several_epochs_the_reference_is_asked_once_and_a_resumed_run_is_the_same(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write(tmp_path / "few.jsonl", read(demo_data / "dpo.jsonl")[:10])
    flags = ("--data_path", str(small), "--epochs", "2.4")
    straight = train(demo_data, tmp_path / "one", *flags)
    file = straight / "reference_logps.pth"
    assert file.exists() and hash_file(file).exists()
    assert load(file)["training"]["ids"].tolist() == list(range(10))
    exact = train(demo_data, tmp_path / "off", *flags, "--precompute_reference", "off")
    one, off = load(straight / "last.pt"), load(exact / "last.pt")
    assert one["progress"]["step"] == 6
    assert one["progress"]["best_value"] == pytest.approx(off["progress"]["best_value"], rel=1e-4)
    for name in ("last.pt", "best_model.pt", "step_000006.pt"):
        (straight / name).unlink(missing_ok=True)
    for damaged in (False, True):  # what is damaged is computed again
        if damaged:
            file.write_bytes(b"damaged")
            (straight / "last.pt").unlink()
            (straight / "step_000006.pt").unlink()
            (straight / "best_model.pt").unlink(missing_ok=True)
        capsys.readouterr()
        train(demo_data, tmp_path / "one", *flags, "--resume_from", "auto")
        assert ("was asked about 10 rows" in capsys.readouterr().err) == damaged
        assert equal(one["model_state_dict"], load(straight / "last.pt")["model_state_dict"])


def test_bounds_cannot_be_precomputed(demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "dpo",
        "--architecture",
        "diffusion",
        "--data_path",
        str(demo_data / "dpo.jsonl"),
        "--out_dir",
        str(tmp_path),
    ]
    assert main([*flags, *TINY, "--precompute_reference", "on"]) == 1
    assert "new noise at every step" in capsys.readouterr().err


def test_labelled_answers_are_refused_where_conversations_are_learned(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled, _ = demo_labels(demo_data, tmp_path)
    assert main(["sft", "--data_path", str(labelled), "--out_dir", str(tmp_path), *TINY]) == 1
    said = capsys.readouterr().err
    assert "a labelled answer (wanted or not), not a conversation to learn" in said and "dpo --loss kto" in said


def test_noise_is_shared_by_policy_and_reference(demo_data: Path) -> None:
    """Equal models have equal bounds, whatever the noise: no reward, in every family."""
    for name in FAMILIES:
        model = model_of(name, 3)
        for loss in ("sigmoid", "ipo", "kto"):
            found = means(method_of(name, loss, model), model, batch_of(loss), step=5)
            assert found["rewards/chosen"] == found["rewards/rejected"] == 0, (name, loss)
            assert found["rewards/accuracies"] == 0  # a tie is not a win
    batch = TokenBatch.from_numpy(PAIRS.chosen, CPU)
    model = model_of("diffusion", 3)
    one, two = (FAMILIES["diffusion"].score(model, batch, Noise.of(0, batch, step, 0)).total for step in (5, 6))
    assert not torch.equal(one, two)


def test_flags_have_the_defaults_of_their_loss() -> None:
    assert PreferenceSettings().strength == PreferenceSettings(loss="kto").strength == 0.1
    assert PreferenceSettings(loss="simpo").strength == 2.0
    assert replace(PreferenceSettings(loss="simpo"), beta=0.7).strength == 0.7
