"""Models of other libraries: what comes in says what transformers says, and every stage can start from it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import HEADERS, KINDS, TALK, foreign_model, write_tokenizer
from torch import Tensor
from training import TINY, load

from minillm.checkpoint import CheckpointLoader
from minillm.checkpoint.folders import read_model
from minillm.checkpoint.model import OpenedCheckpoint, open_checkpoint
from minillm.cli import main
from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Sampling
from minillm.log import UserError
from minillm.models.config import ModelConfig
from minillm.models.dialects import config_from, config_to, weights_from, weights_to
from minillm.models.rotary import rotary_tables
from minillm.models.transformer import LanguageModel
from minillm.rollout.engine import ModelEngine

pytest.importorskip("transformers")
CLOSE = 1e-4
TOKENS = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest) -> tuple[Any, LanguageModel]:
    """transformers' model, and ours with the same weights."""
    return twins(request.param)


def twins(kind: str, **changes: Any) -> tuple[Any, LanguageModel]:
    theirs = foreign_model(kind, **changes)
    values = theirs.config.to_dict()
    config = config_from(values)
    ours = LanguageModel(config).eval()
    ours.load_state_dict(weights_from(theirs.state_dict(), values["model_type"], config))
    return theirs, ours


def logits(model: LanguageModel, tokens: Tensor, **keys: Any) -> Tensor:
    return model.logits(model(tokens, **keys).hidden)


def test_logits_and_gradients_equal_those_of_transformers(both: tuple[Any, LanguageModel]) -> None:
    theirs, ours = both
    expected, found = theirs(TOKENS).logits, logits(ours, TOKENS)
    assert expected.std() > 0.2
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) / 10
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    mapped = weights_from(gradients, theirs.config.model_type, ours.config)
    own = dict(ours.named_parameters())
    assert mapped.keys() == own.keys()
    for key, gradient in mapped.items():
        # without rotations a bias of the keys shifts all scores of a query alike, and a softmax does not see it
        assert gradient.abs().max() > 1e-4 or (ours.config.learned_positions and key.endswith("k_proj.bias")), key
        torch.testing.assert_close(own[key].grad, gradient, atol=CLOSE, rtol=CLOSE, msg=key)


@torch.no_grad()
def test_left_padding_and_segments_change_nothing(both: tuple[Any, LanguageModel]) -> None:
    theirs, ours = both
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[0, :9] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(TOKENS, attention_mask=mask, position_ids=places).logits
    segments = mask.int() - 1  # padding is -1
    found = logits(ours, TOKENS, positions=places, segments=segments)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=CLOSE, rtol=0)
    # two texts in a row say what each says alone
    row = torch.cat((TOKENS[0, :10], TOKENS[1, :14]))[None]
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    packed = logits(ours, row, positions=positions, segments=torch.tensor([[0] * 10 + [1] * 14]))
    torch.testing.assert_close(packed[0, :10], theirs(TOKENS[:1, :10]).logits[0], atol=CLOSE, rtol=0)
    torch.testing.assert_close(packed[0, 10:], theirs(TOKENS[1:2, :14]).logits[0], atol=CLOSE, rtol=0)


def test_cached_generation_writes_what_transformers_writes(both: tuple[Any, LanguageModel]) -> None:
    theirs, ours = both
    prompts = [TOKENS[0, :12].tolist(), TOKENS[1, :4].tolist(), TOKENS[2, :1].tolist()]
    padded = torch.tensor([[0] * (12 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (12 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, 12:].tolist()
    sampling = Sampling(max_new_tokens=16, temperature=0.0)
    assert Autoregressive().generate(ours, prompts, sampling) == expected
    completions = ModelEngine(Autoregressive(), ours, rows=2).generate(prompts, count=1, sampling=sampling)
    assert [own[0].tokens for own in completions] == expected


def test_a_model_goes_back_to_the_names_it_came_with(both: tuple[Any, LanguageModel]) -> None:
    theirs, ours = both
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_to(ours.config)
    assert config_from(json.loads(json.dumps(values))) == ours.config
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="eager").eval()
    back = weights_to(ours.state_dict(), ours.config)
    if ours.config.use_moe:  # transformers 5 joins the experts when it reads files
        assert weights_from(theirs.state_dict(), "qwen3_moe", ours.config).keys() == back.keys()
        return
    missing, unexpected = again.load_state_dict(back, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    again.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, theirs(TOKENS).logits, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_model_that_was_saved_without_its_head_has_the_same_names(base: str) -> None:
    theirs, ours = twins(base, tie_word_embeddings=True)
    body = theirs.base_model.state_dict()
    found = weights_from(body, base, ours.config)
    assert found.keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"hidden_size": None}, "hidden_size|not of its kind"),
        ({"num_attention_heads": 3}, "num_key_value_heads"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "2 labels"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    values = {**config_to(LLAMA), **changes}
    if "rope_scaling" in changes:
        del values["rope_parameters"]
    with pytest.raises(UserError, match=named):
        config_from(values)


LLAMA = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, max_position_embeddings=128, model_type="llama", qk_norm=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 20.0,
         "beta_slow": 2.0, "truncate": False},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512, "attention_factor": 1.25},
    ],
    ids=lambda scaling: "-".join(str(value) for value in scaling.values()),
)  # fmt: skip
def test_scaled_angles_are_those_of_transformers_in_real_sizes(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=65536,
        rope_parameters={**scaling, "rope_theta": 5e5},
    )  # fmt: skip
    frequencies, size = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    cos, sin = rotary_tables(2, 128, 5e5, scaling)
    torch.testing.assert_close(cos[1, :64], frequencies.cos() * size)
    torch.testing.assert_close(sin[1, :64], frequencies.sin() * size, rtol=1e-5, atol=0)


def test_a_window_that_looks_back_cannot_look_both_ways() -> None:
    with pytest.raises(UserError, match="sliding_window"):
        ModelConfig.from_dict({**LLAMA.to_dict(), "sliding_window": 4, "causal": False})


# Folders


def make_folder(folder: Path, kind: str, tokenizer: str = "", dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """A model's folder as transformers writes it; the model."""
    model = foreign_model(kind).to(dtype)
    model.save_pretrained(folder, **keys)
    if tokenizer:
        write_tokenizer(folder, tokenizer)
    return model


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bfloat16", "bin", "sharded bin"])
@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-moe", "gpt2"])
def test_every_form_of_a_folder_gives_its_weights_in_float32(kind: str, form: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    model = make_folder(tmp_path, kind, dtype=dtype, max_shard_size="20KB" if "sharded" in form else "1GB")
    if "bin" in form:
        as_pickles(tmp_path)
    assert len(list(tmp_path.glob("*.index.json"))) == ("sharded" in form)
    _, config, weights = read_model(tmp_path)
    expected = weights_from(model.state_dict(), model.config.model_type, config)
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[key].float()), key


def as_pickles(folder: Path) -> None:
    """The same tensors in files that torch writes."""
    from safetensors.torch import load_file

    def name(old: str) -> str:
        return re.sub(r"\bmodel(-0|\.safetensors)", r"pytorch_model\1", old).replace(".safetensors", ".bin")

    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), folder / name(file.name))
        file.unlink()
    for index in folder.glob("*.safetensors.index.json"):
        (folder / name(index.name)).write_text(name(index.read_text()))
        index.unlink()


def edit_index(folder: Path, change: Any) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))


def duplicate(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, first)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a missing shard": (lambda folder: sorted(folder.glob("model-*"))[0].unlink(), "a shard is missing"),
    "a key twice": (duplicate, "stands in two shards"),
    "an absent key": (
        lambda folder: edit_index(folder, lambda m: m.update({"model.x": next(iter(m.values()))})), "model.x is in",
    ),
    "a shard elsewhere": (lambda folder: edit_index(folder, lambda m: m.update(a="../a.safetensors")), "only names"),
    "no weight_map": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "neither a checkpoint"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], "neither a checkpoint"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_folder(folder, "llama", max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_a_sentence(damage: str, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "model")
    change, message = DAMAGE[damage]
    change(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(tmp_path / "model"))


def test_weights_in_a_few_bits_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_folder(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, key: weights[key].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{key} is int8"):
        read_model(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_reward_model_of_transformers_gives_the_same_rewards(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_config(
        foreign_model(kind, num_labels=1, pad_token_id=0, tie_word_embeddings=False).config
    ).eval()
    theirs.save_pretrained(tmp_path)
    _, config, weights = read_model(tmp_path)
    ours = LanguageModel(config).eval()
    ours.load_state_dict(weights)
    tokens = TOKENS.clamp(min=1)
    with torch.no_grad():
        found = ours.score.of_sequence(ours(tokens).hidden, torch.ones_like(tokens, dtype=torch.bool))
        torch.testing.assert_close(found, theirs(tokens).logits[:, 0], atol=CLOSE, rtol=0)


def test_load_checkpoint_takes_a_folder(sharded: Path) -> None:
    model = LanguageModel(LLAMA_4)
    assert CheckpointLoader.load_checkpoint(model, str(sharded), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, TOKENS), foreign_model("llama")(TOKENS).logits, atol=CLOSE, rtol=0)


LLAMA_4 = ModelConfig.from_dict({**LLAMA.to_dict(), "num_key_value_heads": 4, "tie_word_embeddings": False})


# Whole models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer whose tokens just fill the vocabulary, so that rows must be added."""
    folder = tmp_path_factory.mktemp("llama")
    theirs = write_tokenizer(folder, "headers")
    foreign_model("llama", vocab_size=len(theirs)).save_pretrained(folder)
    return folder


def run(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def test_import_writes_a_checkpoint_that_says_what_the_folder_says(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    run("import", str(llama), "--output", str(tmp_path / "llama.pt"))
    said = capsys.readouterr().err
    assert "<|pad|> (pad) is added" in said and "a new row" in said
    opened = open_checkpoint(str(tmp_path / "llama.pt"))
    assert opened.speaks_in_turns and opened.model.config.model_type == "llama"
    content = load(tmp_path / "llama.pt")
    assert "optimizer_state_dict" not in content and content["parent"]["path"] == str(llama)
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    rows = theirs.config.vocab_size
    tokens = TOKENS % rows
    for each in (opened, open_checkpoint(str(llama))):
        found = logits(each.model, tokens)
        torch.testing.assert_close(found[..., :rows], theirs(tokens).logits, atol=CLOSE, rtol=0)
    head = opened.model.head_weight
    torch.testing.assert_close(head[rows:], head[:rows].mean(0).expand(len(head) - rows, -1))


def test_an_id_of_the_hub_is_fetched_and_named_as_the_parent(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(*what: str) -> Path:
        asked.append(what)
        return llama

    monkeypatch.setattr("minillm.convert.hub.download", download)
    run("import", "someone/llama", "--revision", "v1", "--output", str(tmp_path / "llama.pt"))
    content = load(tmp_path / "llama.pt")
    assert asked == [("someone/llama", "v1")]
    assert content["parent"]["path"] == content["imported"]["path"] == "someone/llama"


def rows_of(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return path


def one_step(stage: str, start: Path, data: Path, out: Path, *flags: str) -> OpenedCheckpoint:
    """One step of a stage from a checkpoint or folder; what it leaves behind, from its run folder."""
    sizes = TINY[4:]  # the checkpoint has sizes
    run(
        stage, "--pretrained_path", str(start), "--data_path", str(data), "--out_dir", str(out), *sizes, "--max_steps",
        "1", "--max_seq_len", "96", "--eval_samples", "2", "--compile", "off", *flags,
    )  # fmt: skip
    folder = next(path for path in out.iterdir() if path.is_dir())
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo"])
def test_every_stage_starts_from_an_imported_model(stage: str, llama: Path, tmp_path: Path) -> None:
    pair = {"prompt": "hello", "chosen": "a table", "rejected": "bob"}
    data = rows_of(tmp_path / "data.jsonl", pair if stage == "dpo" else {"messages": TALK})
    opened = one_step(stage, llama, data, tmp_path / "out")
    start = open_checkpoint(str(llama))
    assert opened.model.config == start.model.config and opened.tokenizer.roles == start.tokenizer.roles
    assert opened.tokenizer.chat_template == HEADERS
    moved = [key for key, value in opened.model.state_dict().items() if not value.equal(start.model.state_dict()[key])]
    assert moved and all("_proj" in key for key in moved) == (stage == "lora")


@pytest.mark.parametrize(
    ("kind", "tokenizer"), [("gpt2", "plain"), ("mistral-window", "instruct"), ("qwen2", "chatml")]
)
def test_adapters_lie_on_every_kind(kind: str, tokenizer: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "model", kind, tokenizer)
    data = rows_of(tmp_path / "data.jsonl", {"messages": TALK})
    opened = one_step("lora", tmp_path / "model", data, tmp_path / "out", "--lora_rank", "2")
    start = open_checkpoint(str(tmp_path / "model"))
    assert not torch.equal(logits(opened.model, TOKENS), logits(start.model, TOKENS))
    for key, value in start.model.state_dict().items():
        if key.endswith("bias"):
            assert torch.equal(value, opened.model.state_dict()[key])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("family", ["diffusion", "sdd"])
def test_an_imported_model_can_begin_as_one_of_another_family(kind: str, family: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "model", kind, "plain")
    run("convert", "--checkpoint", str(tmp_path / "model"), "--to", family, "--output", str(tmp_path / "new.pt"))
    data = rows_of(tmp_path / "data.jsonl", {"messages": TALK})
    opened = one_step("sft", tmp_path / "new.pt", data, tmp_path / "out", "--architecture", family)
    assert opened.architecture == family and not opened.model.config.causal
    assert opened.tokenizer.roles.mask == "<|mask|>" and opened.speaks_in_turns


def test_a_bare_folder_and_a_wrong_output_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for source, output, message in (
        (tmp_path / "empty", tmp_path / "x.pt", "no config.json"),
        (tmp_path / "none", tmp_path / "x.pt", "no folder"),
        (tmp_path / "empty", tmp_path / "x", "ends in .pt"),
    ):
        assert main(["import", str(source), "--output", str(output)]) != 0
        assert message in capsys.readouterr().err
        assert not output.exists()
    with pytest.raises(UserError, match="neither"):
        open_checkpoint(str(tmp_path / "empty"))
