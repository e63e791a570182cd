"""The backbone: hand-written layers are the plain formulas, packing is invisible, the mask means what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import BOTH, DENSE, MOE, random_model, tiny_config

from minillm.data.batches import Batch
from minillm.families.autoregressive import Autoregressive
from minillm.log import UserError
from minillm.methods.likelihood import Likelihood
from minillm.models import experts, layers, linear
from minillm.models.config import PRESETS, ModelConfig, ModelSettings, build_model_config
from minillm.models.lora import AdaptedLinear, Pair
from minillm.models.rotary import rotary_tables
from minillm.models.transformer import LanguageModel, count_parameters


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def test_rms_norm_is_its_formula_in_value_and_gradient() -> None:
    x, weight = double(2, 3, 6), double(6, seed=1)
    plain = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(layers._RMSNorm.apply(x, weight, 1e-6, torch.float64), plain)
    assert torch.autograd.gradcheck(lambda x, w: layers._RMSNorm.apply(x, w, 1e-6, torch.float64), (x, weight))


def test_rms_norm_takes_gradients_of_any_layout() -> None:
    x, weight = double(2, 3, 4, 6), double(6, seed=1)

    def transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return layers._RMSNorm.apply(x, weight, 1e-6, torch.float64).transpose(1, 2).contiguous()

    assert torch.autograd.gradcheck(transposed, (x, weight))


def test_rms_norm_of_zeros_is_zero_with_finite_gradient() -> None:
    x, weight = torch.zeros(1, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    out = layers._RMSNorm.apply(x, weight, 1e-6, torch.float32)
    out.sum().backward()
    assert x.grad is not None
    assert out.eq(0).all() and x.grad.isfinite().all()


def test_rotary_turns_each_pair_by_its_angle() -> None:
    cos, sin = (table.double()[:, None] for table in rotary_tables(5, 4, 100.0))
    x = double(2, 5, 3, 4)
    turned = layers.apply_rotary(x, cos, sin)
    # the pair (x[i], x[i + 2]) as a complex number, times e^(i * position * theta^(-2i/4))
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    pairs = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1), atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(lambda x: layers.apply_rotary(x, cos, sin), (x,))


def test_swiglu_is_its_formula_in_value_and_gradient() -> None:
    gate, up = double(3, 5), double(3, 5, seed=1)
    torch.testing.assert_close(layers.swiglu(gate, up), gate * gate.sigmoid() * up)
    assert torch.autograd.gradcheck(layers.swiglu, (gate, up))


@pytest.fixture(params=["chosen", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose products a linear layer takes: those chosen for this processor, or oneDNN's, which AMD's get."""
    if request.param == "oneDNN":
        if linear.ONEDNN is None:
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(linear, "_CHOSEN", linear.ONEDNN)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_linear_is_a_product_in_value_and_gradient(shape: tuple[int, ...]) -> None:
    layer = linear.Linear(6, 4)
    x = torch.randn(*shape, requires_grad=True)
    plain_x, plain_weight = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    out, plain = layer(x), plain_x @ plain_weight.T
    slope = torch.randn(*shape[:-1], 4)
    (out * slope).sum().backward()
    (plain * slope).sum().backward()
    for ours, reference in ((out, plain), (x.grad, plain_x.grad), (layer.weight.grad, plain_weight.grad)):
        torch.testing.assert_close(ours, reference, check_dtype=False, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("library")
def test_linear_works_on_no_rows_and_on_transposed_input() -> None:
    layer = linear.Linear(6, 4)
    assert layer(torch.empty(0, 6)).shape == (0, 4)
    x = torch.randn(6, 5).t()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("outs", [(24, 24), (6, 3, 3), (3, 3), (5,)], ids=str)  # turned: x, x, the slopes, nothing
@pytest.mark.parametrize("frozen", [False, True])
def test_several_products_of_one_input_have_the_sum_of_their_gradients(outs: tuple[int, ...], frozen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linears = [linear.Linear(6, out) for out in outs]
    linears[0].weight.requires_grad_(not frozen)
    x = torch.randn(2, 300, 6, generator=generator, requires_grad=True)
    slopes = [torch.randn(2, 300, out, generator=generator) for out in outs]
    plain_x = x.detach().double().requires_grad_()
    plain_weights = [layer.weight.detach().double().requires_grad_() for layer in linears]
    products = linear.linear_all(x, *linears)
    plain = [plain_x @ weight.T for weight in plain_weights]
    torch.autograd.backward(products, slopes)
    torch.autograd.backward(plain, [slope.double() for slope in slopes])
    assert (linears[0].weight.grad is None) == frozen
    learned = [(layer.weight.grad, weight.grad) for layer, weight in zip(linears, plain_weights)][frozen:]
    for ours, reference in [*zip(products, plain), (x.grad, plain_x.grad), *learned]:
        assert ours is not None
        torch.testing.assert_close(ours, reference, check_dtype=False, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("library")
def test_adapted_layers_beside_plain_ones_keep_their_adapters() -> None:
    plain, adapted = linear.Linear(6, 4), AdaptedLinear(linear.Linear(6, 4))
    adapted.add("a", Pair(torch.randn(2, 6), torch.randn(4, 2)), 1.0)
    adapted.active = {"a": 1.0}
    x = torch.randn(5, 6)
    for found, layer in zip(linear.linear_all(x, plain, adapted), (plain, adapted)):
        torch.testing.assert_close(found, layer(x))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [linear.MANY_ROWS, 60])
def test_chunks_of_rows_give_a_weight_the_gradient_of_all(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, generator=generator)
    x, slope = torch.randn(600, 6, generator=generator), torch.randn(600, 40, generator=generator)
    chunked = linear.ChunkedWeight(weight, rows)
    for part in (slice(start, start + rows) for start in range(0, 600, rows)):
        torch.testing.assert_close(chunked.multiply(x[part]), x[part] @ weight.T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(chunked.input_grad(slope[part]), slope[part] @ weight, atol=1e-5, rtol=1e-5)
        chunked.add_grad(slope[part], x[part])
    torch.testing.assert_close(chunked.grad(), (slope.T.double() @ x.double()).float(), atol=1e-4, rtol=1e-5)
    assert chunked.grad().is_contiguous() and not linear.ChunkedWeight(weight, rows).grad().any()


@BOTH
def test_eager_by_hand_equals_the_plain_formulas_of_compiled_code(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(config.vocab_size, (2, 9))
    results = []
    for by_hand in (True, False):
        if not by_hand:
            monkeypatch.setattr(layers, "_by_hand", lambda tensor: False)
        model = random_model(config)
        hidden = model(tokens).hidden
        hidden.square().sum().backward()
        results.append([hidden, *(p.grad for p in model.parameters())])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-4)


@BOTH
def test_initialisation_has_small_weights_and_smaller_ones_into_the_residual_stream(config: ModelConfig) -> None:
    model = LanguageModel(replace(config, hidden_size=64, num_hidden_layers=8, intermediate_size=96))
    model.init_weights(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.eq(1).all(), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        wanted = 0.02 / math.sqrt(16) if residual else 0.02
        # a sample's standard deviation is off by 1 / sqrt(2 n)
        assert float(parameter.detach().std()) == pytest.approx(wanted, rel=4 / math.sqrt(2 * parameter.numel())), name


def test_initialisation_depends_on_the_seed_alone() -> None:
    first, again, other = LanguageModel(DENSE), LanguageModel(DENSE), LanguageModel(DENSE)
    first.init_weights(1)
    torch.rand(5)
    again.init_weights(1)
    other.init_weights(2)
    assert torch.equal(first.head_weight, again.head_weight)
    assert not torch.equal(first.head_weight, other.head_weight)


def test_families_begin_with_the_same_values_in_what_they_share() -> None:
    models = {}
    for denoiser in ("", "aggregate", "bilateral"):
        models[denoiser] = LanguageModel(replace(DENSE, denoiser=denoiser))
        models[denoiser].init_weights(3)
    plain = models[""].state_dict()
    for denoiser in ("aggregate", "bilateral"):
        own = models[denoiser].state_dict()
        assert set(plain) < set(own) and all(torch.equal(plain[name], own[name]) for name in plain)
    other = LanguageModel(DENSE)
    other.init_weights(4)
    assert not any(torch.equal(values, plain[name]) for name, values in other.state_dict().items() if values.ndim > 1)


def test_a_model_that_looks_both_ways_begins_by_looking_nearby() -> None:
    """Another token beside a hidden position changes what it sees more than another token further away."""
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(3, DENSE.vocab_size, (16, 41), generator=generator)
    tokens[:, 20] = 2  # what stands for hidden

    def influence(model: LanguageModel, place: int) -> float:
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] - 3 + 7) % (DENSE.vocab_size - 3) + 3
        with torch.no_grad():
            return float((model(changed).hidden - model(tokens).hidden)[:, 20].norm(dim=-1).mean())

    near, far = 0.0, 0.0
    for seed in range(6):
        model = LanguageModel(replace(DENSE, causal=False, hidden_size=128, head_dim=32, num_hidden_layers=1))
        model.init_weights(seed)
        near += influence(model, 19) + influence(model, 21)
        far += influence(model, 4) + influence(model, 36)
    assert near > 2 * far > 0


def packed(pieces: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and segments [1, length] of a row that holds the pieces."""
    tokens, positions = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64)
    segments, start = torch.full((1, length), -1), 0
    for index, piece in enumerate(pieces):
        part = slice(start, start + len(piece))
        tokens[0, part], positions[0, part], segments[0, part] = piece, torch.arange(len(piece)), index
        start = part.stop
    return tokens, positions, segments


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@BOTH
def test_packed_conversations_are_as_if_alone(config: ModelConfig, causal: bool) -> None:
    model = random_model(replace(config, causal=causal))
    pieces = [torch.randint(50, (length,)) for length in (5, 1, 7)]
    tokens, positions, segments = packed(pieces, 17)
    hidden = model(tokens, positions=positions, segments=segments).hidden[0]
    alone = torch.cat([model(piece[None]).hidden[0] for piece in pieces])
    torch.testing.assert_close(hidden[:13], alone, atol=1e-5, rtol=1e-5)
    assert hidden.isfinite().all()


@BOTH
def test_what_stands_in_padding_changes_nothing(config: ModelConfig) -> None:
    model = random_model(config).train()
    tokens, positions, segments = packed([torch.randint(50, (6,))], 10)
    first = model(tokens, positions=positions, segments=segments)
    tokens[0, 6:] = 17
    second = model(tokens, positions=positions, segments=segments)
    assert torch.equal(first.hidden[0, :6], second.hidden[0, :6])
    if config.use_moe:
        assert torch.equal(first.router_loss, second.router_loss)
        alone = model(tokens[:, :6]).router_loss
        torch.testing.assert_close(first.router_loss, alone)


@pytest.mark.parametrize("with_segments", [False, True])
@BOTH
def test_causal_does_not_look_ahead_and_bidirectional_does(config: ModelConfig, with_segments: bool) -> None:
    tokens = torch.randint(50, (1, 8))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 50
    segments = torch.zeros(1, 8, dtype=torch.int64) if with_segments else None
    causal, both_ways = random_model(config), random_model(replace(config, causal=False))
    before, after = (causal(t, segments=segments).hidden for t in (tokens, changed))
    torch.testing.assert_close(before[0, :-1], after[0, :-1], atol=1e-6, rtol=0)
    before, after = (both_ways(t, segments=segments).hidden for t in (tokens, changed))
    assert (before[0, :-1] - after[0, :-1]).abs().amax(-1).min() > 1e-4


def test_embeddings_may_stand_for_tokens() -> None:
    model, tokens = random_model(DENSE), torch.randint(50, (2, 6))
    assert torch.equal(model(tokens).hidden, model(model.model.embed_tokens(tokens)).hidden)


def test_more_tokens_than_positions_is_an_error() -> None:
    with pytest.raises(ValueError, match="65 tokens, the model has 64 positions"):
        LanguageModel(DENSE)(torch.zeros(1, 65, dtype=torch.int64))


def test_every_expert_gets_its_tokens_and_gradients() -> None:
    model = random_model(MOE).train()
    model(torch.arange(50)[None]).hidden.square().sum().backward()
    moved = [p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if ".mlp." in n]
    assert sum(moved) > 0.8 * len(moved)
    assert random_model(MOE)(torch.zeros(1, 1, dtype=torch.int64)).hidden.isfinite().all()  # experts without tokens


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_add_up_token_by_token(padded, top_k, monkeypatch) -> None:
    monkeypatch.setattr(experts, "by_shape", lambda x: padded)
    monkeypatch.setattr(experts, "MANY_ROWS", 0)
    torch.manual_seed(top_k)
    moe = experts.SparseMoe(tiny_config(use_moe=True, num_experts_per_tok=top_k)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    inputs, wanted = [x, *moe.parameters()], torch.randn(2, 9, 16, dtype=torch.float64)

    tokens = []
    for token in x.view(-1, 16):
        best, chosen = moe.gate(token).softmax(-1).topk(top_k)
        share = best / best.sum() if moe.to_one else best
        tokens.append(sum(part * moe.experts[int(expert)](token) for part, expert in zip(share, chosen)))
    expected = torch.stack(tokens).view_as(x)
    output, _ = moe(x)
    close = {"atol": 1e-7, "rtol": 1e-5}  # the router's probabilities are float32
    torch.testing.assert_close(output, expected, **close)
    ours, theirs = (
        torch.autograd.grad((y * wanted).sum(), inputs, allow_unused=True, materialize_grads=True)
        for y in (output, expected)
    )
    for found, correct in zip(ours, theirs):
        torch.testing.assert_close(found, correct, **close)


def test_rows_of_experts_are_padded_to_few_sizes(monkeypatch) -> None:
    moe = experts.SparseMoe(tiny_config(use_moe=True))
    chosen = torch.rand(700, 4, generator=torch.Generator().manual_seed(0)).topk(2).indices
    source, place, sizes = moe._sorted(chosen, padded=True)
    assert all(size % experts.ROWS == 0 for size in sizes) and sum(sizes) == len(source) < 1400 + 4 * experts.ROWS
    assert sum(moe._sorted(chosen, padded=False)[2]) == 1400
    few = moe._sorted(chosen[:50], padded=True)[2]
    assert sum(few) == 100, "a few rows are not worth it"
    # Every choice stands in its expert's slice and reads its own token.
    expert_of = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    assert torch.equal(expert_of[place], chosen)
    assert torch.equal(source[place], torch.arange(700)[:, None].expand(-1, 2))


def test_load_balancing_loss_is_top_k_at_balance_and_grows_with_imbalance() -> None:
    even = torch.eye(4).repeat(3, 1)  # each token slightly prefers one expert, all experts equally often
    assert float(experts.load_balancing_loss([even], 1)) == pytest.approx(1.0)
    lopsided = torch.tensor([[100.0, 0, 0, 0]] * 5)
    assert float(experts.load_balancing_loss([lopsided, lopsided], 1)) == pytest.approx(4.0)


def test_router_loss_belongs_to_training_only() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    assert random_model(MOE)(tokens).router_loss is None
    assert random_model(MOE).train()(tokens).router_loss is not None
    assert random_model(DENSE).train()(tokens).router_loss is None


def test_splitting_a_batch_gives_the_same_gradient_and_norm() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, (6, 12))
    mask = generator.random((6, 12)) < 0.4  # rows count differently: a mean of means would be wrong
    method = Likelihood(Autoregressive(), seed=0)
    gradients = []
    for rows in (6, 2, 1):
        model = random_model(DENSE).train()
        parts = [
            method.prepare(
                model,
                Batch(tokens[i : i + rows], mask[i : i + rows], None, None, np.arange(i, i + rows)),
                torch.device("cpu"),
                0,
                i,
            )
            for i in range(0, 6, rows)
        ]
        count = sum(part.count for part in parts)
        for part in parts:
            (method.loss(model, part.data).loss / count).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for split in gradients[1:]:
        for whole, ours in zip(gradients[0], split):
            torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-5)
        norms = [float(torch.nn.utils.get_total_norm(each)) for each in (gradients[0], split)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_tied_weights_are_one_parameter() -> None:
    tied, untied = (LanguageModel(replace(DENSE, tie_word_embeddings=tie)) for tie in (True, False))
    assert count_parameters(untied) - count_parameters(tied) == 50 * 16
    assert "lm_head.weight" not in tied.state_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_documented_sizes(name: str) -> None:
    config = build_model_config(ModelSettings(model_config=name), vocab_size=6400, max_seq_len=512, causal=True)
    documented = {
        "small": (384, 6, 6, 1536),
        "medium": (512, 8, 8, 2048),
        "large": (768, 12, 12, 3072),
        "xl": (1024, 24, 16, 4096),
    }
    assert documented[name] == (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
    )


def test_single_flags_override_the_preset_and_the_rest_follows() -> None:
    settings = ModelSettings(model_config="small", hidden_size=128, num_hidden_layers=3)
    config = build_model_config(settings, vocab_size=10, max_seq_len=4000, causal=True)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 3, 2)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (64, 1, 512)
    assert config.max_position_embeddings == 4000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ModelSettings(hidden_size=100, num_attention_heads=3), "not divisible"),
        (ModelSettings(hidden_size=64, num_attention_heads=4, num_key_value_heads=3), "multiple"),
        (ModelSettings(hidden_size=12, num_attention_heads=4), "even"),
        (ModelSettings(use_moe=True, num_experts=2, num_experts_per_tok=3), "num_experts_per_tok is 3"),
    ],
)
def test_impossible_sizes_are_named(settings: ModelSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model_config(settings, vocab_size=10, max_seq_len=8, causal=True)


def test_model_config_survives_its_dictionary_and_refuses_unknown_fields() -> None:
    assert ModelConfig.from_dict(MOE.to_dict()) == MOE
    with pytest.raises(UserError, match="depth"):
        ModelConfig.from_dict({**MOE.to_dict(), "depth": 3})
