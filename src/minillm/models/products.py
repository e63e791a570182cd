"""Products of a few rows with weights that stay as they are: each weight laid out once, as the processor wants it.

What counts is how fast a weight is fetched. Measured on preset small, whose weights do not fit a cache:

- Intel: a few rows read a weight at memory's speed where it lies as [in, out]. For a dozen rows MKL spends most of its
  time on packing the weight, so it is packed beforehand.
- AMD: for one row MKL reads neither layout at more than half of memory's speed; for two rows, with the weight [out, in]
  as the first factor, it does, so one row stands twice. From three rows on, and in bfloat16, oneDNN with its own layout
  takes 0.4 to 0.6 of the time of [in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.models.linear import ONEDNN
from minillm.models.processor import AMD

_MKL = hasattr(torch.ops.mkl, "_mkl_linear") and torch.backends.mkl.is_available()
_PACKED = range(7, 17)  # rows that MKL multiplies with packed weights: fewer are as fast without, more gain nothing


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes two microseconds even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


class Product:
    """x [N, in] -> [N, out]: weights [out, in] below each other, their inputs scaled.

    Each layout is a copy, made when it is first needed.

    Args:
        weights: [out, in] each.
        dtype: number format of the product.
        scale: [in].
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, scale: Tensor | None = None) -> None:
        self.weights, self.scale, self.dtype = [weight.detach() for weight in weights], scale, dtype
        self.shape = self.weights[0].new_empty(1).expand(sum(map(len, weights)), weights[0].shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        return self._way(len(x))(as_dtype(x, self.dtype))

    def added(self, x: Tensor, product: Tensor) -> Tensor:
        """x + product @ weight; x keeps its width."""
        if x.dtype == self.dtype and self._way(len(product)) == self._by_turned:
            return torch.addmm(x, product, self._turned)
        return x + self(product)

    def _way(self, rows: int) -> Callable[[Tensor], Tensor]:
        single = self.dtype == torch.float32
        if single and torch.is_autocast_enabled("cpu"):  # which knows torch's own products alone
            return self._by_turned
        if AMD and single and rows <= 2:
            return self._by_two
        if AMD and self._onednn_multiplies:
            return self._by_onednn
        return self._by_mkl if _MKL and not AMD and single and rows in _PACKED else self._by_turned

    @cached_property
    def _onednn_multiplies(self) -> bool:
        if ONEDNN is None or self.dtype not in (torch.float32, torch.bfloat16):
            return False
        return self.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def _join(self) -> Tensor:
        """[out, in]; where there is one weight and no scale, the weight itself."""
        joined = torch.cat(self.weights) if len(self.weights) > 1 else self.weights[0]
        return (joined if self.scale is None else joined * self.scale).to(self.dtype)

    @cached_property
    def _joined(self) -> Tensor:
        return self._join()

    @cached_property
    def _turned(self) -> Tensor:
        """[in, out]."""
        return self._join().t().contiguous()  # turned last: the only pass that reads across

    @cached_property
    def _for_mkl(self) -> Tensor:
        return torch.ops.mkl._mkl_reorder_linear_weight(self._join(), _PACKED[-1])

    @cached_property
    def _for_onednn(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self._join(), _PACKED[-1])

    def _by_turned(self, x: Tensor) -> Tensor:
        return torch.mm(x, self._turned)

    def _by_two(self, x: Tensor) -> Tensor:
        rows = len(x)
        return torch.mm(self._joined, (x if rows == 2 else torch.cat((x, x))).t())[:, :rows].t().contiguous()

    def _by_mkl(self, x: Tensor) -> Tensor:
        rows, packed_rows = len(x), _PACKED[-1]  # what is packed is packed for one number of rows
        if rows < packed_rows:
            x = F.pad(x, (0, 0, 0, packed_rows - rows))
        return torch.ops.mkl._mkl_linear(x, self._for_mkl, self.shape, None, packed_rows)[:rows]

    def _by_onednn(self, x: Tensor) -> Tensor:
        assert ONEDNN is not None
        return ONEDNN(x, self._for_onednn, None, "none", [], "")  # packed for a dozen rows is right for any number
