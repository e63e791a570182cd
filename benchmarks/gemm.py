"""The matrix products of a training step on a CPU, by every library that can be reached from inside PyTorch.

    python benchmarks/gemm.py --presets small --threads 1

For each linear layer of a preset: the product of the forward pass and those of both gradients, in float32, at the rows
of one micro-batch. Ways: MKL (torch.mm), oneDNN (as models/linear.py asks for it on AMD), weights packed beforehand for
either, inductor's C++ template with max-autotune, and, for comparison, the OpenBLAS that NumPy brings. All ways take
turns, round after round; medians count. With one thread the processor's own time is taken, which others on the machine
disturb less; with more, the clock's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from common import RESULTS, machine, machine_line, main, median, preset_config, table, write_results

from minillm.config import parse
from minillm.log import info

WAYS = ("mkl", "onednn", "mkl packed", "onednn packed", "inductor", "openblas")


@dataclass(frozen=True)
class GemmBenchmark:
    """Matrix products by library"""

    presets: str = field(default="small,medium", metadata={"help": "presets, separated by commas"})
    rows: int = field(default=2048, metadata={"help": "tokens at once", "min": 1})
    threads: int = field(default=1, metadata={"help": "threads of every library", "min": 1})
    rounds: int = field(default=31, metadata={"help": "rounds in which every way takes its turn", "min": 1})
    no_inductor: bool = field(default=False, metadata={"help": "leave inductor out: it compiles each shape"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


class Product(NamedTuple):
    """x [m, k] times w, and how often a step of one micro-batch takes it."""

    layer: str
    kind: str  # forward, x gradient, w gradient
    m: int
    k: int
    n: int
    times: int

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.k * self.n

    @property
    def name(self) -> str:
        return f"{self.layer}, {self.kind}"


def products(preset: str, rows: int) -> list[Product]:
    """Those of a micro-batch of this preset."""
    config = preset_config(preset, seq=256)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    parts = -(-rows // max(64, (1 << 22) // config.vocab_size))
    chunk = -(-rows // parts)  # rows of logits at once (models/heads.py)
    linears = [
        ("queries", rows, width, queries, layers), ("keys or values", rows, width, keys, 2 * layers),
        ("output", rows, queries, width, layers), ("gate or up", rows, width, inner, 2 * layers),
        ("down", rows, inner, width, layers), ("head", chunk, width, config.vocab_size, parts),
    ]  # fmt: skip
    found = []
    for layer, m, inputs, outputs, times in linears:
        found.append(Product(layer, "forward", m, inputs, outputs, times))
        found.append(Product(layer, "x gradient", m, outputs, inputs, times))
        found.append(Product(layer, "w gradient", outputs, m, inputs, times))
    return found


def ways(product: Product, *, inductor: bool) -> dict[str, Callable[[], Any]]:
    """The product as each library takes it, from operands that lie in memory as training has them: activations and
    gradients by rows, weights as [out, in]."""
    import numpy as np
    import torch

    from minillm.models.linear import turned

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    m, k, n = product.m, product.k, product.n
    packed: dict[str, Callable[[], Any]] = {}
    if product.kind == "w gradient":
        # grad.T [out, rows] @ x [rows, in]; for oneDNN the first operand is turned, as models/linear.py does it
        a, b = random(k, m).t(), random(k, n)

        def one() -> torch.Tensor:
            if n < m:
                return turned(torch.ops.mkldnn._linear_pointwise(turned(b), a, None, "none", [], ""))
            return torch.ops.mkldnn._linear_pointwise(turned(a.t()), b.t(), None, "none", [], "")
    else:
        weight = random(n, k) if product.kind == "forward" else random(k, n).t()
        a, b = random(m, k), weight.t()
        one = lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")  # noqa: E731
        laid = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), m)
        packed["onednn packed"] = lambda: torch.ops.mkldnn._linear_pointwise(a, laid, None, "none", [], "")
        if hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight") and torch.backends.mkl.is_available():
            plain = weight.contiguous()
            mkl = torch.ops.mkl._mkl_reorder_linear_weight(plain, m)
            packed["mkl packed"] = lambda: torch.ops.mkl._mkl_linear(a, mkl, plain, None, m)
    left, right = a.numpy(), b.numpy()
    result = {"mkl": lambda: torch.mm(a, b), "onednn": one, **packed, "openblas": lambda: np.matmul(left, right)}
    if inductor:
        result["inductor"] = _inductor(a, b)
    expected = torch.mm(a, b)
    for name, way in result.items():
        value = way()
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-2), f"{name} computes something else"
    return result


def _inductor(a: Any, b: Any) -> Callable[[], Any]:
    """Inductor's choice between its C++ template and the libraries. The template wants a constant second operand (it is
    packed when compiling), which weights in training are not: so it is made one here."""
    import torch
    from torch._inductor import config

    class Multiply(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(b.t(), requires_grad=False)

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.linear(x, self.weight)

    settings = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN", "freezing": True}
    module = Multiply().eval()
    compiled = torch.compile(module)

    def run() -> Any:
        with torch.no_grad():
            return compiled(a)

    with config.patch(settings):
        run()
    return run


def measure(product: Product, settings: GemmBenchmark) -> dict[str, list[float]]:
    """Seconds of each way by round."""
    callables = ways(product, inductor=not settings.no_inductor)
    clock = time.thread_time if settings.threads == 1 else time.perf_counter
    names = list(callables)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(settings.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            callables[name]()  # its operands come into the cache, its own threads awake
            started = clock()
            callables[name]()
            seconds[name].append(clock() - started)
    return seconds


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/gemm.py", __doc__ or "", [GemmBenchmark], argv)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before the libraries are loaded
        os.environ[name] = str(settings.threads)
    import torch

    torch.set_num_threads(settings.threads)
    where = machine()
    shown = [way for way in WAYS if way != "inductor" or not settings.no_inductor]
    results, sections = [], []
    for preset in settings.presets.split(","):
        totals = dict.fromkeys(shown, 0.0)
        flops, rows = 0.0, []
        for product in products(preset, settings.rows):
            seconds = measure(product, settings)
            torch._dynamo.reset()
            results.append({"preset": preset, **product._asdict(), "seconds": seconds})
            rates = {way: product.flops / median(values) / 1e9 for way, values in seconds.items()}
            for way in shown:  # where a way does not exist, MKL's product would be taken
                totals[way] += product.times * median(seconds.get(way, seconds["mkl"]))
            flops += product.times * product.flops
            sizes = f"{product.m} x {product.k} x {product.n}"
            rows.append([product.name, sizes, *(f"{rates[way]:.0f}" if way in rates else "-" for way in shown)])
            info(f"[benchmark] {preset} {rows[-1][:2]}: " + ", ".join(f"{k} {v:.0f}" for k, v in rates.items()))
        rows.append(["**all of a step**", "", *(f"**{flops / totals[way] / 1e9:.0f}**" for way in shown)])
        sections += [f"## Preset {preset}, GFLOP/s", table(["product", "m x k x n", *shown], rows)]
    clock = "processor's time" if settings.threads == 1 else "clock"
    markdown = "\n\n".join(
        [
            "# Matrix products by library", machine_line(where),
            f"float32, {settings.rows} tokens at once, {settings.threads} threads, medians of {settings.rounds}, "
            f"by the {clock}. The sum takes MKL's product where a way has none (gradients cannot be packed).",
            *sections,
        ]
    )  # fmt: skip
    data = {"machine": where, "settings": asdict(settings), "results": results}
    write_results(settings.results, f"gemm_{settings.threads}", data, markdown)
    return 0


if __name__ == "__main__":
    main(run)
