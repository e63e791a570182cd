"""Distillation: one view for both models, in every family; teachers from disk; answers of the student; a cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import CPU, END, IDS, PACKED, PAD, belief, diffusion
from tiny import random_model, tiny_config
from training import TINY, equal, load, without_times

from minillm.cli import main
from minillm.data.batches import Batch
from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Family, Noise, TokenBatch
from minillm.log import UserError
from minillm.methods.distill import Distillation, ModelTeacher, Part
from minillm.methods.own_answers import OwnAnswers
from minillm.models.divergence import Objective, States
from minillm.models.transformer import LanguageModel
from minillm.text.tokenizer import Tokenizer

FAMILIES: dict[str, Callable[[], Family]] = {
    "ar": Autoregressive,
    "diffusion": diffusion,
    "diffusion-blocks": lambda: diffusion(diffusion_block=4),
    "sdd": belief,
}
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
PADDED = Batch(*(None if each is None else each.numpy() for each in PACKED))  # type: ignore[arg-type]


def rows(count: int) -> Batch:
    """The packed row of the denoisers' tests, under several sample ids."""
    parts = [None if each is None else np.repeat(each, count, axis=0) for each in vars(PADDED).values()]
    return Batch(*parts[:4], np.arange(count))  # type: ignore[arg-type]


def model_of(family: Family, seed: int, **changes: Any) -> LanguageModel:
    return random_model(tiny_config(causal=family.causal, denoiser=family.denoiser, **changes), seed)


def method_of(family: Family, teacher: LanguageModel, **changes: Any) -> Distillation:
    values: dict[str, Any] = {"objective": Objective("jsd", 0.3, 1.5), "ce_weight": 0.25, "seed": 3, **changes}
    return Distillation(family, ModelTeacher(teacher, "its hash"), **values)


def writer(family: Family) -> OwnAnswers:
    return OwnAnswers(family, end_of_turn=END, end_of_text=IDS.mask, pad=PAD)


@EVERY_FAMILY
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
def test_both_models_read_the_students_view_and_its_weights_count(name: str, experts: bool) -> None:
    family = FAMILIES[name]()
    student = model_of(family, 0, use_moe=experts)
    teacher = model_of(family, 1, hidden_size=24, num_hidden_layers=1, use_moe=not experts)
    batch = rows(6)
    method = method_of(family, teacher)
    prepared = method.prepare(student, batch, CPU, 5, 10)
    loss, metrics = method.loss(student, prepared.data)

    tokens = TokenBatch.from_numpy(batch, CPU)
    view = family.view(student, tokens, Noise.of(3, tokens, 5, 10))
    log_q, log_p = (
        (each.logits(view.through(each).hidden).double() / 1.5).log_softmax(-1) for each in (student, teacher)
    )
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    jsd = (0.3 * log_p.exp() * (log_p - log_m) + 0.7 * log_q.exp() * (log_q - log_m)).sum(-1)
    plain = student.logits(view.through(student).hidden).double().log_softmax(-1)
    cross_entropy = -plain.gather(-1, view.targets[..., None])[..., 0]
    wanted = (view.weights * (0.25 * cross_entropy + 0.75 * 1.5**2 * jsd)).sum()
    assert len(view.weights[view.weights != 0].unique()) > 1 or name == "ar"
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert prepared.count == view.count

    shown = view.weights if view.extra is None else view.weights.masked_fill(view.extra, 0.0)
    assert metrics["divergence"][0].item() == pytest.approx((shown * 1.5**2 * jsd).sum().item(), rel=1e-3)
    assert metrics["cross_entropy"][0].item() == pytest.approx((shown * cross_entropy).sum().item(), rel=1e-4)
    assert metrics["divergence"][1] == metrics["loss"][1] == view.count


@EVERY_FAMILY
def test_an_equal_teacher_gives_no_gradient_and_no_teacher_ever_changes(name: str) -> None:
    family = FAMILIES[name]()
    student, same, other = (model_of(family, seed) for seed in (0, 0, 1))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    for teacher, smallest, largest in ((same, 0.0, 1e-4), (other, 1e-2, np.inf)):
        student.zero_grad()
        method = method_of(family, teacher, ce_weight=0.0, objective=Objective())
        method.loss(student.train(), method.prepare(student, rows(4), CPU, 0, 0).data).loss.backward()
        size = max(float(each.grad.abs().max()) for each in student.parameters() if each.grad is not None)
        assert smallest <= size <= largest
        assert all(each.grad is None for each in teacher.parameters())
    assert equal(before, dict(other.state_dict()))


def test_the_cut_into_micro_batches_does_not_matter() -> None:
    family = diffusion()
    student, teacher = model_of(family, 0), model_of(family, 1)
    method = method_of(family, teacher)
    whole = method.loss(student, method.prepare(student, rows(4), CPU, 0, 8).data).loss
    halves = torch.zeros(())
    for start in (0, 2):
        part = Batch(*(None if each is None else each[start : start + 2] for each in vars(rows(4)).values()))  # type: ignore[arg-type]
        halves = halves + method.loss(student, method.prepare(student, part, CPU, 0, 8 + start).data).loss
    assert halves.item() == pytest.approx(whole.item(), rel=1e-5)


# Answers of the student's own.


@EVERY_FAMILY
def test_own_answers_keep_prompts_and_places(name: str) -> None:
    family = FAMILIES[name]()
    if name == "diffusion-blocks":
        pytest.skip("as diffusion, slower")
    student = model_of(family, 0).train()
    data = TokenBatch.from_numpy(rows(2), CPU)
    noise = Noise.of(0, data, 3, 0)
    own = writer(family)(student, data, noise)
    assert student.training
    for row in range(2):
        for segment, (start, first, end) in enumerate(((0, 2, 8), (8, 10, 12))):
            assert torch.equal(own.tokens[row, start:first], data.tokens[row, start:first])
            assert not own.loss_mask[row, start:first].any()
            assert own.segments is not None and own.positions is not None
            written = own.loss_mask[row, start:end].sum()
            assert own.loss_mask[row, first : first + written].all()
            assert (own.segments[row, start : first + written] == segment).all()
            assert (own.segments[row, first + written : end] == -1).all()
            assert (own.tokens[row, first + written : end] == PAD).all()
            assert own.positions[row, start : first + written].tolist() == list(range(first - start + written))
            assert written == end - first or own.tokens[row, first + written - 1] == END
        assert own.segments is not None and (own.segments[row, 12:] == -1).all()
    again = writer(family)(student, data, noise)
    assert torch.equal(own.tokens, again.tokens)
    assert not torch.equal(own.tokens, writer(family)(student, data, Noise.of(0, data, 4, 0)).tokens)


def test_an_own_answer_belongs_to_its_row_not_to_its_batch() -> None:
    student = model_of(Autoregressive(), 0)
    data = TokenBatch.from_numpy(rows(3), CPU)
    noise = Noise.of(0, data, 3, 0)
    together = writer(Autoregressive())(student, data, noise)
    for row in range(3):
        alone = TokenBatch(*(None if each is None else each[row : row + 1] for each in data))  # type: ignore[arg-type]
        own = writer(Autoregressive())(student, alone, Noise.of(0, alone, 3, row))
        assert torch.equal(own.tokens[0], together.tokens[row])


def test_a_share_of_the_rows_is_written_by_the_student_and_has_no_cross_entropy() -> None:
    family = Autoregressive()
    student, teacher = model_of(family, 0), model_of(family, 1)
    method = method_of(family, teacher, own_share=0.5, write=writer(family), ce_weight=1.0)
    data = method.prepare(student, rows(32), CPU, 0, 0).data
    assert [part.own for part in data] == [False, True]
    assert len(data[0].sample_ids) + len(data[1].sample_ids) == 32 and 8 <= len(data[1].sample_ids) <= 24
    assert torch.equal(data[0].view.inputs, TokenBatch.from_numpy(rows(len(data[0].sample_ids)), CPU).tokens)
    # The data's rows have cross-entropy alone here, the student's own have divergence alone.
    loss, metrics = method.loss(student, data)
    wanted = metrics["cross_entropy"][0] + metrics["on_policy/divergence"][0]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert metrics["cross_entropy"][1] == data[0].view.count
    assert metrics["on_policy/divergence"][1] == data[1].view.count
    evaluated = method.prepare(student, rows(32), CPU, -1, 0).data
    assert [part.own for part in evaluated] == [False]


# Runs.

STEPS = ("--max_steps", "4", "--save_every", "2", "--eval_every", "2", "--max_seq_len", "64")


def run(command: str, data: Path, out: Path, *flags: str, code: int = 0) -> Path:
    """Train; the run's folder."""
    arguments = [
        command, "--data_path", str(data / "sft.jsonl"), "--validation_data", str(data / "sft_val.jsonl"), "--out_dir",
        str(out), *TINY, *STEPS, *flags,
    ]  # fmt: skip
    assert main(arguments) == code
    found = (
        [path for path in out.glob("*/training_config.json") if ".previous" not in str(path)] if out.exists() else []
    )
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else out


@pytest.fixture(scope="module")
def teachers(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of every family, of width 48."""
    out = tmp_path_factory.mktemp("teachers")
    for architecture in ("ar", "diffusion", "sdd"):
        run("sft", demo_data, out, "--architecture", architecture, "--hidden_size", "48", "--max_steps", "2")
    return out


def teacher_of(teachers: Path, architecture: str) -> tuple[str, ...]:
    prefix = "" if architecture == "ar" else f"{architecture}_"
    return ("--teacher", str(teachers / f"{prefix}full_sft_48.pth"), "--architecture", architecture)


def resumed(first: Path, data: Path, out: Path, *flags: str) -> Path:
    """The same run, as it was after two steps, goes on."""
    again = out / first.name
    shutil.copytree(first, again)
    for name in ("last.pt", "best_model.pt", "step_000004.pt"):
        (again / name).unlink(missing_ok=True)
    return run("distill", data, out, *flags, "--resume_from", "auto")


def assert_same_end(first: Path, second: Path) -> None:
    one, two = (without_times(load(path / "last.pt")) for path in (first, second))
    for key in ("model_state_dict", "optimizer_state_dict", "training_log", "validation_log", "rng_state"):
        assert equal(one[key], two[key]), key


@pytest.mark.parametrize(
    ("architecture", "flags"),
    [
        ("ar", ("--divergence", "jsd", "--temperature", "2")),
        ("ar", ("--use_moe", "--num_experts", "2", "--cache_teacher", "4")),
        ("ar", ("--on_policy_share", "0.5", "--alpha", "0")),
        ("diffusion", ("--use_moe", "--num_experts", "2")),
        ("sdd", ("--divergence", "reverse_kl")),
    ],
    ids=["ar", "ar-moe-cached", "ar-on-policy", "diffusion-moe", "sdd"],
)
def test_a_run_that_is_resumed_ends_the_same_and_the_teacher_is_not_copied(
    architecture: str, flags: tuple[str, ...], teachers: Path, demo_data: Path, tmp_path: Path
) -> None:
    flags = (*teacher_of(teachers, architecture), *flags)
    first = run("distill", demo_data, tmp_path / "one", *flags)
    assert "full_dist_32" in first.name and not list(first.glob("teacher*"))
    assert_same_end(first, resumed(first, demo_data, tmp_path / "two", *flags))
    columns = (first / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {"train/divergence", "train/cross_entropy", "train/agreement", "val/divergence"} <= {*columns}
    assert "val/perplexity" not in columns  # the loss is no likelihood


def test_a_resumed_run_refuses_another_teacher(
    teachers: Path, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("distill", demo_data, tmp_path, *teacher_of(teachers, "ar"))
    folder = teachers / "full_sft_48"
    other = ("--teacher", str(folder / "step_000002.pt"))
    assert main(["distill", "--data_path", str(demo_data / "sft.jsonl"), "--out_dir", str(tmp_path), *TINY, *STEPS,
                 *other, "--resume_from", "auto"]) == 1  # fmt: skip
    assert "is not the one this run began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--architecture", "diffusion"), "they cannot read the same view"),
        (("--max_seq_len", "4096"), "fewer than --max_seq_len 4096"),
        (("--cache_teacher", "4", "--on_policy_share", "0.5"), "give one of the two"),
        (("--teacher", "missing.pth"), "there is no checkpoint missing.pth"),
    ],
    ids=["family", "positions", "cache-on-policy", "missing"],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(
    flags: tuple[str, ...], said: str, teachers: Path, demo_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run("distill", demo_data, tmp_path, *teacher_of(teachers, "ar")[:2], *flags, code=1)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*full_dist*"))


def test_noise_at_every_step_cannot_be_cached(
    teachers: Path, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("distill", demo_data, tmp_path, *teacher_of(teachers, "sdd"), "--cache_teacher", "4", code=1)
    assert "new noise at every step" in capsys.readouterr().err


def test_a_teacher_of_another_tokenizer_is_refused(teachers: Path, tmp_path: Path) -> None:
    from minillm.train.teacher import open_teacher

    tokenizer = Tokenizer.load()
    other = Tokenizer(tokenizer.json_text.replace('"<think>"', '"<thunk>"'), tokenizer.chat_template)
    path = str(teachers / "full_sft_48.pth")
    with pytest.raises(UserError, match="another tokenizer than the student"):
        open_teacher(path, family=Autoregressive(), tokenizer=other, max_seq_len=64, device=CPU)


# The cache.


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in load(folder / "last.pt")["training_log"]]


def test_a_cache_of_the_whole_vocabulary_trains_as_the_teacher_does(
    teachers: Path, demo_data: Path, tmp_path: Path
) -> None:
    flags = teacher_of(teachers, "ar")
    plain = run("distill", demo_data, tmp_path / "one", *flags)
    cached = run("distill", demo_data, tmp_path / "two", *flags, "--cache_teacher", str(Tokenizer.load().vocab_size))
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    few = run("distill", demo_data, tmp_path / "three", *flags, "--cache_teacher", "8")
    assert losses(few) != pytest.approx(losses(plain), rel=1e-5)


def test_the_cache_is_read_again_and_made_anew_where_it_does_not_belong(
    teachers: Path, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*teacher_of(teachers, "ar"), "--cache_teacher", "4")
    first = losses(run("distill", demo_data, tmp_path, *flags))
    cache = tmp_path / "full_dist_32.teacher"
    capsys.readouterr()

    assert losses(run("distill", demo_data, tmp_path, *flags)) == first
    assert "holds what the teacher says of these rows" in capsys.readouterr().err

    run("distill", demo_data, tmp_path, *flags, "--seed", "7")  # other rows in another order
    assert "is made anew: it is of another teacher" in capsys.readouterr().err
    run("distill", demo_data, tmp_path, *flags)
    capsys.readouterr()

    content = bytearray((cache / "train_log_probs.bin").read_bytes())
    content[100] ^= 0xFF
    (cache / "train_log_probs.bin").write_bytes(content)
    assert losses(run("distill", demo_data, tmp_path, *flags)) == first
    assert "train_log_probs.bin is damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*building*"))


# A teacher that transformers loads.


def test_a_folder_for_transformers_says_what_the_checkpoint_says(
    teachers: Path, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from minillm.train.teacher import ForeignTeacher, open_teacher

    checkpoint, folder = str(teachers / "full_sft_48.pth"), tmp_path / "hf"
    assert main(["export", "--checkpoint", checkpoint, "--output", str(folder)]) == 0
    tokenizer = Tokenizer.load()
    ours, theirs = (
        open_teacher(path, family=Autoregressive(), tokenizer=tokenizer, max_seq_len=64, device=CPU)
        for path in (checkpoint, str(folder))
    )
    assert isinstance(theirs, ForeignTeacher)
    data = TokenBatch.from_numpy(rows(3), CPU)
    part = Part(Autoregressive().view(theirs.model, data, Noise.of(0, data, 0, 0)), data.sample_ids, False, False)
    one, two = ours.about(part), theirs.about(part)
    assert isinstance(one, States) and isinstance(two, States)
    torch.testing.assert_close(one.hidden @ one.head.T, two.hidden @ two.head.T, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="holds an ar model; the student is diffusion"):
        open_teacher(str(folder), family=diffusion(), tokenizer=tokenizer, max_seq_len=64, device=CPU)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace('"<think>"', '"<thunk>"')
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="another vocabulary than the student"):
        open_teacher(str(folder), family=Autoregressive(), tokenizer=tokenizer, max_seq_len=64, device=CPU)


def test_another_kind_of_model_teaches_packed_rows_one_conversation_at_a_time(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from minillm.train.teacher import open_teacher

    tokenizer = Tokenizer.load()
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=tokenizer.vocab_size + 16, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    llama.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    teacher = open_teacher(str(tmp_path), family=Autoregressive(), tokenizer=tokenizer, max_seq_len=64, device=CPU)
    data = TokenBatch.from_numpy(rows(1), CPU)
    part = Part(Autoregressive().view(llama, data, Noise.of(0, data, 0, 0)), data.sample_ids, False, False)
    found = teacher.about(part)
    assert isinstance(found, States)
    with torch.no_grad():
        alone = [
            llama(data.tokens[:, piece]).logits[0, :, : tokenizer.vocab_size] for piece in (slice(0, 8), slice(8, 12))
        ]
    wanted = torch.cat(alone)[part.view.weights[0, :12] != 0]  # rows that pad the vocabulary are left out
    torch.testing.assert_close(found.hidden @ found.head.T, wanted, atol=1e-4, rtol=1e-4)
