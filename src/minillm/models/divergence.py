"""How far a student's next-token distribution is from its teacher's, mixed with cross-entropy, in chunks.

N tokens, D hidden_size of the student, D' of the teacher, V vocabulary, K tokens that are known of a teacher.
The logits [N, V] of neither model ever exist: each chunk of both gives its sums and gradients and is gone before the
next. With z the logits, T the temperature, p = softmax(z_teacher / T) and q = softmax(z_student / T), a token costs

    weight * (ce_share * -log softmax(z_student)[target] + (1 - ce_share) * T^2 * divergence(p, q))

T^2 keeps the gradient about as large as at T = 1 (arXiv 1503.02531, section 2). The divergences and beta are those of
arXiv 2306.13649, section 2, with m = beta p + (1 - beta) q:

    forward_kl  KL(p || q)        reverse_kl  KL(q || p)        jsd  beta KL(p || m) + (1 - beta) KL(q || m)

Where only the K most probable tokens of a teacher are known, all others are one outcome, in p and in q: the divergence
is taken over K + 1 outcomes with p_rest = 1 - sum_k p_k and q_rest = 1 - sum_k q_k. It is at most the exact one, since
merging outcomes never adds divergence, and it is the exact one for K = V.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.models.heads import chunk_rows
from minillm.models.linear import ChunkedWeight, multiply

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Objective(NamedTuple):
    """Which divergence, and at which temperature."""

    divergence: str = "forward_kl"
    beta: float = 0.5  # jsd: the teacher's share of the mixture, above 0 and below 1
    temperature: float = 1.0


class TopK(NamedTuple):
    """What is known of a teacher's distributions of N tokens at some temperature."""

    tokens: Tensor | None  # int64 [N, K]; None: the whole vocabulary in order
    log_probs: Tensor  # float32 [N, K], of these tokens
    rest: Tensor | None  # float32 [N], log of the probability of all others together; None where there are none

    def chunk(self, part: slice, temperature: float) -> TopK:
        """Of some of the N tokens; the temperature is the one they were made with."""
        return TopK(*(None if each is None else each[part] for each in self))  # type: ignore[arg-type]


class States(NamedTuple):
    """A teacher's hidden states [N, D'] and its head [V, D'], from which its distributions follow."""

    hidden: Tensor
    head: Tensor

    def chunk(self, part: slice, temperature: float) -> TopK:
        """The whole distributions of some of the N tokens."""
        logits = multiply(self.hidden[part], self.head.to(self.hidden.dtype)).float()
        return TopK(None, logits.div_(temperature).log_softmax(-1), None)


class Distilled(NamedTuple):
    """The summed loss, differentiable, and of each token [B, L] (0 or False where its weight is zero):"""

    loss: Tensor
    cross_entropy: Tensor  # weight * -log q(target) at temperature 1
    divergence: Tensor  # weight * T^2 * divergence
    hits: Tensor  # bool: the target is the student's most probable token
    agreements: Tensor  # bool: the teacher's most probable token is the student's


def top_k(teacher: States, count: int, temperature: float) -> TopK:
    """The `count` most probable tokens of each of N distributions; all of them, in order, where there are no more."""
    vocabulary = len(teacher.head)
    rows = chunk_rows(teacher.hidden, 2 * vocabulary)  # logits of two models
    parts = [slice(start, start + rows) for start in range(0, len(teacher.hidden), rows)]
    found = [_most_probable(teacher.chunk(part, temperature).log_probs, min(count, vocabulary)) for part in parts]
    tokens, log_probs, rest = (torch.cat(column) for column in zip(*found))
    return TopK(tokens, log_probs, rest if count < vocabulary else None)


def _most_probable(log_probs: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    values, tokens = log_probs.topk(count, dim=-1)
    return tokens, values, log_probs.scatter(1, tokens, -math.inf).logsumexp(-1)


def divergence_slopes(log_p: Tensor, log_q: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The divergence [n] of q from p, and its derivative by the logits of q [n, outcomes] at temperature 1."""
    p, q = log_p.exp(), log_q.exp()
    if objective.divergence == "forward_kl":
        return (p * (log_p - log_q)).sum(-1), q - p
    if objective.divergence == "reverse_kl":
        ratio = log_q - log_p
        value = (q * ratio).sum(-1)
        return value, q * (ratio - value[:, None])
    beta = objective.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher = (p * (log_p - log_m)).sum(-1)
    ratio = log_q - log_m
    student = (q * ratio).sum(-1)
    return beta * teacher + (1 - beta) * student, (1 - beta) * q * (ratio - student[:, None])


def _against(known: TopK, log_q: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The same against what is known of a teacher: values [n] and slopes by all logits [n, V]."""
    if known.tokens is None:
        return divergence_slopes(known.log_probs, log_q, objective)
    log_p, picked = known.log_probs, log_q.gather(1, known.tokens)
    if known.rest is None:
        values, slopes = divergence_slopes(log_p, picked, objective)
        return values, torch.zeros_like(log_q).scatter_(1, known.tokens, slopes)
    rest = log_q.scatter(1, known.tokens, -math.inf).logsumexp(-1, keepdim=True)
    values, slopes = divergence_slopes(
        torch.cat((log_p, known.rest[:, None]), 1), torch.cat((picked, rest), 1), objective
    )
    # Within the rest, the slope goes to each token by its share of the rest's probability.
    spread = (log_q - rest).exp_().mul_(slopes[:, -1:])
    return values, spread.scatter_(1, known.tokens, slopes[:, :-1])


class _Distillation(torch.autograd.Function):
    """The weights are known before the backward pass, so gradients are taken while the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher: States | TopK, targets: Tensor, weights: Tensor,
        ce_share: Tensor, objective: Objective,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        cross_entropy = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        divergence = torch.empty_like(cross_entropy)
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        agreements = torch.empty_like(hits)
        temperature, rows = objective.temperature, chunk_rows(hidden, 2 * len(head))
        narrow = ChunkedWeight(head.to(hidden.dtype), rows)
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            logits = narrow.multiply(hidden[part]).float()
            target, weight, share = targets[part, None], weights[part, None], ce_share[part, None]
            log_q = logits.log_softmax(-1)
            known = teacher.chunk(part, temperature)
            best = logits.argmax(-1)
            hits[part] = best == target[:, 0]
            first = known.log_probs.argmax(-1, keepdim=True)
            agreements[part] = best == (first if known.tokens is None else known.tokens.gather(1, first))[:, 0]
            cross_entropy[part] = -(weight * log_q.gather(1, target))[:, 0]
            softened = log_q if temperature == 1.0 else logits.div_(temperature).log_softmax(-1)
            values, slopes = _against(known, softened, objective)
            divergence[part] = values * weight[:, 0] * temperature**2
            if hidden_grad is None:
                continue
            slopes.mul_(weight * (1.0 - share) * temperature)  # T^2, and 1 / T of z / T
            pull = weight * share
            slopes.addcmul_(log_q.exp_(), pull).scatter_add_(1, target, -pull)
            slope = slopes.to(hidden.dtype)
            hidden_grad[part] = narrow.input_grad(slope)
            if ctx.needs_input_grad[1]:
                narrow.add_grad(slope, hidden[part])
        if needs_grad:
            ctx.save_for_backward(hidden_grad, narrow.grad() if ctx.needs_input_grad[1] else None)
            ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(cross_entropy, divergence, hits, agreements)
        loss = (ce_share * cross_entropy + (1.0 - ce_share) * divergence).sum()
        return loss, cross_entropy, divergence, hits, agreements

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        head = None if head_grad is None else (head_grad * grad).to(ctx.head_dtype)
        return hidden_grad * grad, head, None, None, None, None, None


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: States | TopK,
    targets: Tensor,
    weights: Tensor,
    ce_share: Tensor,
    objective: Objective,
) -> Distilled:
    """The sum over all tokens of what the head of this file says.

    Args:
        hidden: [B, L, D]. head: [V, D]. targets: int64 [B, L]. weights: float [B, L].
        teacher: of the N tokens whose weight is not zero, row after row.
        ce_share: float, what broadcasts to [B, L].
    """
    used = weights != 0
    share = ce_share.expand(weights.shape)[used].float()
    loss, *columns = _Distillation.apply(
        hidden[used], head, teacher, targets[used], weights[used].float(), share, objective
    )
    none = torch.zeros(weights.shape, dtype=torch.float32, device=weights.device)
    spread = [none.to(column.dtype).masked_scatter(used, column) for column in columns]
    return Distilled(loss, *spread)
