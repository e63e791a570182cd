"""The loss of every family: weighted cross-entropy through the vocabulary head, in chunks.

N tokens, D hidden_size, V vocabulary. The full logits [N, V] never exist: each chunk of them gives its sum
and its gradients and is gone before the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.models.linear import ChunkedWeight

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}  # logits held at once: what products are fast with


class WeightedLoss(NamedTuple):
    """Sums over tokens, to be divided by the count of the whole step."""

    loss: Tensor  # sum of weight * -log p(target), in nats, differentiable
    losses: Tensor  # its terms, float32 [B, L]
    hits: Tensor  # bool [B, L]: the target is the most probable token, where the weight is not zero


def chunk_rows(hidden: Tensor, width: int) -> int:
    """Rows of `hidden` [N, D] to take at once where each makes `width` elements: parts of one size, none a remnant,
    with which products are slow."""
    most = max(64, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"]) // width)
    parts = max(1, -(-len(hidden) // most))
    return max(1, -(-len(hidden) // parts))


def _probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [n, V] into softmax(logits) in place; returns log p(target) [n] and whether the target is the most
    probable token [n]."""
    top = logits.amax(-1, keepdim=True)
    target = logits.gather(1, targets[:, None])
    torch.softmax(logits, -1, out=logits)
    most = logits.amax(-1, keepdim=True)  # never rounded to zero, as p(target) may be
    return (target - top + most.log()).squeeze(1), (target >= top).squeeze(1)


class _Chunked:
    """The rows of `hidden` in chunks, with the float32 logits of each, whose memory the next ones take over."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self.hidden, self.rows = hidden, chunk_rows(hidden, len(head))
        self.head = ChunkedWeight(head.to(hidden.dtype), self.rows)

    def __iter__(self) -> Any:
        for start in range(0, len(self.hidden), self.rows):
            part = slice(start, min(start + self.rows, len(self.hidden)))
            yield part, self.head.multiply(self.hidden[part]).float()  # float32 is the product itself

    def add_gradients(
        self,
        part: slice,
        probabilities: Tensor,
        target: Tensor,
        weight: Tensor,
        hidden_grad: Tensor,
        head_learns: bool,
    ) -> None:
        """Gradients of sum(weight * -log p(target)) for one chunk, whose probabilities are overwritten. A frozen head
        gets none.

        d / d logits = weight * (p - onehot); the factor is applied to the narrow side of the products.
        """
        probabilities.scatter_add_(1, target[:, None], probabilities.new_full((len(target), 1), -1.0))
        slope, scale = probabilities.to(self.hidden.dtype), weight[:, None].to(self.hidden.dtype)
        torch.mul(self.head.input_grad(slope), scale, out=hidden_grad[part])
        if head_learns:
            self.head.add_grad(slope, self.hidden[part] * scale)


class _WeightedCrossEntropy(torch.autograd.Function):
    """The weights are known before the backward pass, so the gradients are taken while the logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        chunks = _Chunked(hidden, head)
        for part, logits in chunks:
            target, weight = targets[part], weights[part]
            log_prob, hits[part] = _probabilities(logits, target)
            torch.mul(log_prob, -weight, out=losses[part])
            if hidden_grad is None:
                continue
            chunks.add_gradients(part, logits, target, weight, hidden_grad, ctx.needs_input_grad[1])
        if needs_grad:
            ctx.save_for_backward(hidden_grad, chunks.head.grad() if ctx.needs_input_grad[1] else None)
            ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(losses, hits)
        return losses.sum(), losses, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        return hidden_grad * grad, None if head_grad is None else (head_grad * grad).to(ctx.head_dtype), None, None


class _TokenLogProbs(torch.autograd.Function):
    """log p(target) of each token, differentiable; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for part, logits in _Chunked(hidden, head):
            out[part] = _probabilities(logits, targets[part])[0]
        ctx.save_for_backward(hidden, head, targets)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, head, targets = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        chunks, head_learns = _Chunked(hidden, head), ctx.needs_input_grad[1]
        for part, logits in chunks:
            _probabilities(logits, targets[part])
            chunks.add_gradients(part, logits, targets[part], -grad[part], hidden_grad, head_learns)
        return hidden_grad, chunks.head.grad().to(head.dtype) if head_learns else None, None


def weighted_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> WeightedLoss:
    """Sum of weight * -log softmax(hidden @ head.T)[target] over all tokens whose weight is not zero.

    Args:
        hidden: [B, L, D]. head: [V, D]. targets: int64 [B, L]. weights: float [B, L].
    """
    used = weights.flatten().nonzero().squeeze(1)  # asked for once: a GPU has to be waited for
    loss, losses, hits = _WeightedCrossEntropy.apply(
        hidden.flatten(0, 1).index_select(0, used), head, targets.flatten()[used], weights.flatten()[used].float()
    )
    none = torch.zeros(weights.numel(), dtype=torch.float32, device=weights.device)
    losses, hits = none.index_copy(0, used, losses), none.bool().index_copy(0, used, hits)
    return WeightedLoss(loss, losses.view(weights.shape), hits.view(weights.shape))


def token_log_probs(hidden: Tensor, head: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """log softmax(hidden @ head.T)[target] where `mask` is True, 0 elsewhere: float32 [B, L], differentiable.

    Args:
        hidden: [B, L, D]. head: [V, D]. targets: int64 [B, L]. mask: bool [B, L].
    """
    values = _TokenLogProbs.apply(hidden[mask], head, targets[mask])
    return torch.zeros(mask.shape, dtype=torch.float32, device=hidden.device).masked_scatter(mask, values)
