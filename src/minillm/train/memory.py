"""How much memory training takes, by kind, before a run. Formulas only: no torch here.

T tokens that the model sees at once, D hidden_size, W width of the feed-forward part, H heads and K key/value heads of
E, V vocabulary. What a layer keeps for its gradient was counted with autograd's own hooks; what the allocator cannot
use again was fitted to measured peaks (benchmarks/memory.py compares the whole with new ones).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minillm.models.config import ModelConfig
from minillm.models.processor import AMD

MIB = 2**20
# torch, tokenizers and the kernels that the processor's library builds (measured, 2 threads at most); a GPU's context
# and workspaces (assumed).
LIBRARIES = {"cpu": 400 * MIB, "cuda": 700 * MIB}
# Share of all tensors that lies in holes which no other tensor fits. glibc's heap: fitted. A GPU's allocator: assumed.
HOLES = {"cpu": 0.12, "cuda": 0.05}
# The same of what all layers compute again: gradients that stay are put where it was. glibc's heap: fitted, on AMD with
# attention by products.
HOLES_OF_RECOMPUTED = {"cpu": 0.1 if AMD else 0.2, "cuda": 0.0}
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}  # elements; as in models/heads.py, which needs torch
MUON_AT_ONCE = 1 << 25  # elements; as in train/optim.py
TURNED_FROM = 256  # rows; as in models/linear.py
EXPERT_ROWS, MANY_EXPERT_ROWS = 32, 128  # as in models/experts.py
ATTENTION_LONGEST, ATTENTION_QUERIES = 512, {"float32": 32, "bfloat16": 64}  # as in models/attention_products.py
CPU_TOKENS_AT_ONCE = 2048  # what keeps one layer's activations in a CPU's cache
BLOCK_8BIT, LEAST_8BIT = 256, 4096  # values that share a scale, and of the smallest tensor that is kept so


def rows_at_once(*, batch_size: int, rows_per_step: int, row_tokens: int, on_cpu: bool) -> int:
    """Rows the model sees at once where nobody says: on a GPU a batch, on a CPU what its cache holds; a divisor of the
    step, so that shapes are equal."""
    if not on_cpu:
        return batch_size
    wanted = max(1, min(rows_per_step, CPU_TOKENS_AT_ONCE // row_tokens))
    return next(rows for rows in range(wanted, 0, -1) if rows_per_step % rows == 0)


@dataclass(frozen=True)
class Load:
    """What a process trains at once, and how."""

    config: ModelConfig
    rows: int  # that the model sees at once
    length: int  # tokens a row
    optimizer: str  # adamw, muon or adamw8bit
    gradient_checkpointing: str = "none"
    dtype: str = "float32"  # of the products
    device: str = "cpu"  # or cuda, for any GPU
    micro_batches: int = 2  # a step
    shards: int = 1  # processes that share one copy of the weights
    packed: bool = False  # rows hold several texts, kept apart by a mask
    candidates: int = 8  # a position's, in SDD
    trained_share: float = 1.0  # of the weights: an adapter trains few
    frozen_models: int = 0  # of the same size, that are read and not trained

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes by kind. `peak` is less than their sum where a step is one micro-batch: gradients come as activations
    go."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    libraries: int
    holes: int
    peak: int


def parameters(config: ModelConfig) -> int:
    """All parameters, as `count_parameters` counts those of the model built from this configuration."""
    layers = config.num_hidden_layers
    total = sum(count for count, _ in _matrices(config)) + _vectors(config)
    total += config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    if config.denoiser:
        total += config.hidden_size  # REST
    if config.denoiser == "bilateral":
        total += layers * (config.hidden_size + 4 * config.hidden_size * config.head_dim) + config.hidden_size
    if config.learned_positions:
        total += config.max_position_embeddings * config.hidden_size
    return total + (config.hidden_size if config.value_head else 0)


def _matrices(config: ModelConfig) -> list[tuple[int, bool]]:
    """(elements, does Muon train it) of each matrix inside the layers."""
    width, head = config.hidden_size, config.head_dim
    attention = [width * head * heads for heads in (config.num_attention_heads, config.num_key_value_heads)] * 2
    found: list[tuple[int, bool]] = []
    for layer in range(config.num_hidden_layers):
        found += [(count, True) for count in attention]
        if config.use_moe and layer not in config.dense_layers:
            found += [(width * config.moe_intermediate_size, True)] * (3 * config.num_experts)
            found.append((width * config.num_experts, False))
        else:
            found += [(width * config.intermediate_size, True)] * (2 if config.learned_positions else 3)
    return found


def _vectors(config: ModelConfig) -> int:
    """Norms and biases."""
    width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    if config.learned_positions:  # GPT-2: weight and bias of each norm, biases everywhere
        return config.num_hidden_layers * (4 * width + 3 * inner + width + config.intermediate_size + width) + 2 * width
    biases = (inner + 2 * config.num_key_value_heads * config.head_dim) if config.qkv_bias else 0
    return config.num_hidden_layers * (2 * width + (2 * config.head_dim if config.qk_norm else 0) + biases) + width


def optimizer_bytes(config: ModelConfig, optimizer: str, trained_share: float = 1.0) -> int:
    """State of all parameters: two moments of 4 bytes (AdamW), of 1 byte and a scale for 256 (8 bits), or one of 4 for
    the matrices inside the layers (Muon)."""
    total = parameters(config)
    matrices = _matrices(config)
    if optimizer == "muon":
        inside = sum(count for count, muon in matrices if muon)
        return round(trained_share * (4 * inside + 8 * (total - inside)))
    if optimizer == "adamw8bit":
        embedding = config.vocab_size * config.hidden_size
        large = [count for count, _ in matrices] + [embedding] * (1 if config.tie_word_embeddings else 2)
        eight = sum(count for count in large if count >= LEAST_8BIT and count % BLOCK_8BIT == 0)
        return round(trained_share * (2 * eight * (1 + 4 / BLOCK_8BIT) + 8 * (total - eight)))
    return round(trained_share * 8 * total)


def _kept(load: Load) -> tuple[float, float, float]:
    """Bytes that a layer keeps for each token: of attention and norms; of the inside of the feed-forward part; and
    beside the layer, an SDD model's candidates and the router's logits."""
    config = load.config
    size = 4 if load.dtype == "float32" else 2
    width, head = config.hidden_size, config.head_dim
    q, k = config.num_attention_heads * head, config.num_key_value_heads * head
    # The residual stream stays float32: once for each norm. What the norm says, once for the products.
    outside = 2 * width * (4 + size)
    before_norms = q + k if config.qk_norm and not config.learned_positions else 0
    outside += size * (before_norms + q + 2 * k + q)  # and after rotation, and what attention says
    outside += 4 * (2 + 3 * config.num_attention_heads)  # norms' and attention's own numbers
    masked = load.packed or bool(config.sliding_window)
    if weights := _attention_weights(load, masked):
        outside += size * weights
    elif masked:
        outside += load.length * size  # each layer has the mask as numbers
    if config.use_moe:
        chosen: float = config.num_experts_per_tok
        by_shape = load.device == "cpu" and (AMD or load.dtype != "float32")
        if by_shape and load.tokens * chosen >= MANY_EXPERT_ROWS * config.num_experts:
            chosen += config.num_experts * EXPERT_ROWS / 2 / load.tokens  # what each expert's rows are filled up with
        # Inputs and outputs of the chosen experts in their order; indices and weights.
        inside = chosen * (size * (2 * width + 3 * config.moe_intermediate_size) + 24)
    elif config.learned_positions:
        inside = size * 2 * config.intermediate_size
    else:
        inside = size * (3 if load.device == "cpu" else 4) * config.intermediate_size
    beside = 8.0 * config.num_experts if config.use_moe else 0.0  # the router's word, for the balancing loss
    if config.denoiser == "bilateral":
        places = load.candidates + 1
        beside += places * width * (4 + 4)  # before and after they attend to each other
        if load.gradient_checkpointing == "none":
            beside += places * size * (width + 4 * head)
    return outside, inside, beside


def _attention_weights(load: Load, masked: bool) -> int:
    """Weights of attention that a layer keeps for each token, where models/attention_products.py multiplies."""
    causal = load.config.causal and not masked
    if not AMD or load.device != "cpu" or load.length > ATTENTION_LONGEST or load.dtype not in ATTENTION_QUERIES:
        return 0
    if load.dtype == "float32" and not (causal or masked):
        return 0
    seen = (load.length + ATTENTION_QUERIES[load.dtype]) // 2 if causal else load.length
    return load.config.num_attention_heads * seen


def _divided(load: Load) -> tuple[float, float]:
    """Of what a layer computes for each token the bytes that it keeps, and those that are computed again."""
    outside, inside, _ = _kept(load)
    return {
        "none": (outside + inside, 0.0),
        "selective": (outside, inside),
        "full": (4.0 * load.config.hidden_size, outside + inside),
    }[load.gradient_checkpointing]


def activation_bytes(load: Load) -> int:
    """What the layers keep for the backward pass; of one layer what is computed again, and the gradients within."""
    _, inside, beside = _kept(load)
    kept, again = _divided(load)
    layers, width = load.config.num_hidden_layers, load.config.hidden_size
    ends = 16.0 * width  # the embedding's output, the last norm's, the loss's input and its gradient
    return round(load.tokens * (layers * (kept + beside) + again + inside + ends))


def logits_bytes(load: Load) -> int:
    """The chunk of logits at hand, and the gradient of the vocabulary head, which is made while they are."""
    vocabulary, width = load.config.vocab_size, load.config.hidden_size
    most = max(64, LOGITS_AT_ONCE[load.device] // vocabulary)
    rows = -(-load.tokens // -(-load.tokens // most))
    size = 4 if load.dtype == "float32" else 2
    copies = 4 if size == 4 else 4 + 2 * size  # under autocast: the product, and the gradient's operand
    head = vocabulary * width * (size if size == 4 else 2 * size)
    if AMD and load.device == "cpu" and size == 4 and rows >= TURNED_FROM:
        head *= 3  # with the weight, turned, and the gradient of the chunk at hand
    return rows * vocabulary * copies + head


def memory_of(load: Load) -> Memory:
    """All of it, for one process, at the worst moment of a step after the first."""
    config, shards = load.config, load.shards
    count = parameters(config)
    weights = 4 * count // shards + 4 * count * load.frozen_models  # what is only read is whole everywhere
    # Shards of the gradients are made after the last micro-batch: until then they are whole.
    gradients = round(4 * count * load.trained_share) // (shards if load.micro_batches == 1 else 1)
    state = optimizer_bytes(config, load.optimizer, load.trained_share) // shards
    whole = 0  # what is there whole for a while although the weights are shared
    layer = 4 * (sum(each for each, _ in _matrices(config)) // config.num_hidden_layers)
    if shards > 1:
        whole = 2 * layer + 4 * config.vocab_size * config.hidden_size
    if load.dtype != "float32":
        weights += 2 * (count - config.vocab_size * config.hidden_size)  # autocast's copies
    activations, logits = activation_bytes(load) + whole, logits_bytes(load)
    moved = 0  # by Muon, at the end of the step
    if load.optimizer == "muon":
        largest = max(each for each, muon in _matrices(config) if muon)
        same = 2 * config.num_hidden_layers * (config.num_experts if config.use_moe else 1)
        moved = 4 * 4 * min(same * largest, max(largest, MUON_AT_ONCE))
    passing = activations + logits
    worst = max(passing, moved) + gradients if load.micro_batches > 1 else max(passing, gradients + moved)
    tensors = weights + state + worst
    recomputed = load.tokens * config.num_hidden_layers * _divided(load)[1]
    holes = round(HOLES[load.device] * tensors + HOLES_OF_RECOMPUTED[load.device] * recomputed)
    libraries = LIBRARIES[load.device]
    return Memory(weights, gradients, state, activations, logits, libraries, holes, peak=tensors + holes + libraries)


def largest_rows(load: Load, available: int, choices: list[int]) -> int:
    """The most of these numbers of rows at once whose peak is at most `available` bytes; 0: none is."""
    total = load.rows * load.micro_batches
    fitting = [
        rows
        for rows in choices
        if memory_of(replace(load, rows=rows, micro_batches=max(1, -(-total // rows)))).peak <= available
    ]
    return max(fitting, default=0)
