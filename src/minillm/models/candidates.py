"""Positions that hold several weighted candidates instead of one token: the input of the SDD family.

B batch, L length, K candidates, D hidden_size. The probabilities of a position are true ones over the whole
vocabulary: they sum to at most 1, and the mass that is missing multiplies one learned embedding, REST.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.config import ModelConfig
from minillm.models.layers import RMSNorm
from minillm.models.linear import Linear

LEAST_PROBABILITY = 1e-9  # of a candidate, where its logarithm is taken


class Candidates(NamedTuple):
    """What is believed about each position."""

    tokens: Tensor  # int64 [B, L, K]
    probabilities: Tensor  # float32 [B, L, K], each row sums to at most 1

    @classmethod
    def known(cls, tokens: Tensor, count: int) -> Candidates:
        """Certainty: tokens [B, L] with probability 1; the other K - 1 places are empty."""
        probabilities = torch.zeros(*tokens.shape, count, device=tokens.device)
        probabilities[..., 0] = 1.0
        return cls(tokens.unsqueeze(-1).expand(*tokens.shape, count), probabilities)

    @classmethod
    def most_probable(cls, logits: Tensor, count: int) -> Candidates:
        """The `count` most probable tokens of logits [.., V], with their probabilities over all of them."""
        values, tokens = logits.float().topk(count, dim=-1)
        return cls(tokens, (values - logits.float().logsumexp(-1, keepdim=True)).exp())

    def where(self, condition: Tensor, other: Candidates) -> Candidates:
        """These where `condition` [B, L] holds, else the other's."""
        mask = condition.unsqueeze(-1)
        return Candidates(
            torch.where(mask, self.tokens, other.tokens), torch.where(mask, self.probabilities, other.probabilities)
        )

    def rows(self, index: Tensor | slice) -> Candidates:
        return Candidates(self.tokens[index], self.probabilities[index])

    @property
    def rest(self) -> Tensor:
        """The mass that belongs to the rest of the vocabulary: [B, L]."""
        return (1.0 - self.probabilities.sum(-1)).clamp(min=0.0)


class CandidateAttention(nn.Module):
    """Attention among the candidates of one position, biased by the logarithm of their probabilities.

    One head of head_dim: every position has K + 1 keys only (the last is REST).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.head_dim
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj, self.k_proj = Linear(width, inner), Linear(width, inner)
        self.v_proj, self.o_proj = Linear(width, inner), Linear(inner, width)

    def forward(self, candidates: Tensor, log_probabilities: Tensor) -> Tensor:
        """candidates [B, L, K + 1, D], log_probabilities [B, L, K + 1] -> what is added to the candidates."""
        x = self.norm(candidates)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        bias = log_probabilities.to(q.dtype).unsqueeze(-2).expand(*q.shape[:-1], q.shape[-2])
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


class CandidateInput(nn.Module):
    """The learned parts that turn candidates into what the layers read.

    `aggregate`: their embeddings are summed under their probabilities before the first layer. `bilateral`: they
    stay apart through all layers; each layer lets them attend to each other, reads them pooled, and adds what
    it found to all; a learned readout pools them at the end.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rest = nn.Parameter(torch.empty(1, config.hidden_size))
        self.bilateral = config.denoiser == "bilateral"
        if self.bilateral:
            self.layers = nn.ModuleList(CandidateAttention(config) for _ in range(config.num_hidden_layers))
            self.readout = Linear(config.hidden_size, 1)

    def aggregate(self, candidates: Candidates, embedding: Tensor) -> Tensor:
        """sum_j p_j * E[token_j] + rest * REST: [B, L, D]."""
        tokens, probabilities = candidates
        count = tokens.shape[-1]
        summed = F.embedding_bag(
            tokens.reshape(-1, count),
            embedding,
            per_sample_weights=probabilities.to(embedding.dtype).reshape(-1, count),
            mode="sum",
        )
        return summed.view(*tokens.shape[:-1], -1) + candidates.rest.to(embedding.dtype).unsqueeze(-1) * self.rest

    def separate(self, candidates: Candidates, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings with REST as the last candidate [B, L, K + 1, D], and log-probabilities [B, L, K + 1]."""
        vectors = F.embedding(candidates.tokens, embedding)
        rest = self.rest.expand(*vectors.shape[:-2], 1, -1)
        mass = torch.cat((candidates.probabilities, candidates.rest.unsqueeze(-1)), dim=-1)
        return torch.cat((vectors, rest), dim=-2), mass.clamp(min=LEAST_PROBABILITY).log()

    def pool(self, candidates: Tensor, log_probabilities: Tensor) -> Tensor:
        """One vector a position [B, L, D]: a softmax of what the readout says plus the log-probability."""
        scores = self.readout(candidates).squeeze(-1).float() + log_probabilities
        # a product and a sum, which autocast leaves in the precision of the residual stream
        return (scores.softmax(-1).to(candidates.dtype).unsqueeze(-1) * candidates).sum(-2)
