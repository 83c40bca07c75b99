"""The guard's arithmetic in isolation: what one site costs, spelled in different ways.

    python benchmarks/spellings.py

A chain of fused skip-norms with a small MLP between them, as a genai decoder has them, once without a guard and once with
each spelling (`restore` in float32), in ONNX Runtime. The difference divided by the number of sites is the cost of a site:
microseconds that can be seen here, while a whole decode step of a real model hides them in its noise.

`shipped` is whatever `vlmguard.graphs.rewrite` writes now. The others are candidates: a candidate that wins belongs in a
lowering, with the conformance test; here it is only timed, and compared with `shipped` so that a wrong one cannot win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from decoder_call import session_options
from measure import Budget, Spread, asked, in_huge_pages, interleaved, say
from record import parser, write_result
from shapes import SHAPES

from vlmguard.graphs.call_inputs import CallInputs
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.node_builder import NodeBuilder
from vlmguard.graphs.plan import GuardPlan, SitePlan
from vlmguard.graphs.positions import LastToken
from vlmguard.graphs.reference import LayerGuard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.sites import ResidualSite

BOTTLENECK = 64
PHASES = {"decode": (1, 128), "prefill": (256, 0)}
BUDGET = Budget(least=50, most=400, seconds=40)
AGREEMENT = 1e-5  # of the chain's output, relative to its largest number


@dataclass(frozen=True)
class Spelling:
    """One way to write a site.

    Attributes:
        corrects: `branch`: the fused norm sums `(residual, branch + delta)`; `sum`: it sums `(residual + branch, delta)`,
            one Add less, the same bits in float32, and not in float16, where the kernel would not have rounded the sum.
        gate: `cast`: Greater, Cast, Mul. `where`: Greater, Where. `hard_sigmoid`: HardSigmoid (so
            steep that it is a step), Mul.
        read: `slices`: one MatMul, then two Slices (ONNX Runtime makes a Split of them). `split`: one MatMul, one Split.
            `two`: two MatMuls. `padded`: no Slice of the coordinates, and a zero row in what is written. `unpacked`: as
            `split`, with matrices `[1, d, m + 1]` and `[1, m, d]`: ONNX Runtime packs a constant of two axes, padded to 16
            columns, and an axis more keeps it from that. `transposed`: as `unpacked`, rows for the read (FusedMatMul).
        gather: for positions `last`: `both`: GatherND of both summands, then `[batch, d]`. `sum`: GatherND of the sum,
            `[batch, 1, d]` from there on. `flat`: the same by Reshape and Gather. `none`: every token is read, and the gate
            selects.
    """

    corrects: str = "sum"
    gate: str = "where"
    read: str = "split"
    gather: str = "sum"

    @property
    def name(self) -> str:
        return f"corrects {self.corrects}, gate {self.gate}, read {self.read}, gather {self.gather}"


SPELLINGS = {
    "last": (
        Spelling("branch", "cast", "slices", "both"),
        Spelling("branch", "cast", "slices", "sum"),
        Spelling("branch", "cast", "slices", "flat"),
        Spelling("branch", "cast", "slices", "none"),
        Spelling("branch", "cast", "transposed", "flat"),
        Spelling("branch", "cast", "transposed", "none"),
        Spelling("branch", "where", "transposed", "none"),
        Spelling("branch", "hard_sigmoid", "transposed", "none"),
        Spelling("branch", "cast", "unpacked", "none"),
        Spelling("sum", "cast", "transposed", "none"),
        Spelling("sum", "hard_sigmoid", "transposed", "none"),
    ),
    "all": (
        Spelling("branch", "cast", "slices"),
        Spelling("branch", "cast", "split"),
        Spelling("branch", "cast", "two"),
        Spelling("branch", "cast", "padded"),
        Spelling("branch", "cast", "unpacked"),
        Spelling("branch", "cast", "transposed"),
        Spelling("branch", "where", "transposed"),
        Spelling("sum", "cast", "slices"),
        Spelling("sum", "cast", "transposed"),
        Spelling("sum", "hard_sigmoid", "transposed"),
    ),
}


def main() -> None:
    options = parser("spellings", __doc__)
    options.add_argument("--rank", type=int, action="append", help="default: 1 and 8")
    args = options.parse_args()
    shape = SHAPES[args.shape]
    for positions, spellings in SPELLINGS.items():
        for phase in PHASES:
            rows = []
            for rank in args.rank or (1, 8):
                rows += _measure(shape.hidden_size, shape.num_hidden_layers, rank, positions, phase, spellings, args)
            about = {"shape": shape.told, "sites": shape.num_hidden_layers, "positions": positions, "phase": phase}
            write_result(args, "spellings", {**about, "rows": rows}, f"{positions}/{phase}")


def _measure(
    width: int, sites: int, rank: int, positions: str, phase: str, spellings: tuple[Spelling, ...], args: Any
) -> list[dict[str, Any]]:
    guards = [_numbers(seed, width, rank) for seed in range(sites)]
    graphs = {"unguarded": Chain(width, sites).model}
    for lowering in ("lowrank", "rank1"):
        graphs[f"shipped {lowering}"] = _shipped(width, guards, positions, lowering)
    for spelling in spellings:
        graphs[spelling.name] = _spelled(width, guards, positions, spelling)
    nodes = {name: len(list(model.graph)) for name, model in graphs.items()}
    sessions = {name: _session(model, args.threads) for name, model in graphs.items()}
    feeds = _feeds(width, *PHASES[phase])
    _require_agreement({name: np.asarray(session.run(None, feeds)[0]) for name, session in sessions.items()})
    calls = {name: _call(session, feeds) for name, session in sessions.items()}
    times = interleaved(calls, "unguarded", asked(args, BUDGET), warm_up=3)
    rows = []
    for name in graphs:
        cost = Spread.of((times[name] - times["unguarded"]) / sites * 1e6)
        written = (nodes[name] - nodes["unguarded"]) / sites
        say(f"{positions}/{phase} rank {rank}: {cost.median:6.1f} us a site, {written:4.1f} nodes: {name}")
        rows.append({"name": name, "rank": rank, "us": cost.to_json(), "nodes": round(written, 1)})
    return rows


# The chain


class Chain:
    """`sites` fused skip-norms; `model`, and what a site is made of."""

    def __init__(self, width: int, sites: int) -> None:
        stream = ir.Value(name="stream", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", width]))
        mask = ir.Value(name="attention_mask", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "t"]))
        graph = ir.Graph([stream, mask], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="chain")
        self.builder = NodeBuilder(graph, "chain")
        random = np.random.default_rng(0)
        self.sites: list[ir.Node] = []
        normed = stream
        for number in range(sites):
            down, up = (self._weight(random, f"{number}_{name}", *dims) for name, dims in _mlp(width))
            inner = self.builder.op(f"{number}_inner", "MatMul", [normed, down])
            branch = self.builder.op(f"{number}_branch", "MatMul", [inner, up])
            branch.type, branch.shape = stream.type, stream.shape
            stream, normed = self._skip_norm(number, stream, branch, width)
        self.builder.place_last()
        graph.outputs.append(normed)
        self.model = ir.Model(graph, ir_version=10)
        for value in (*graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            if value.name and value.name.startswith(
                "vlmguard/"
            ):  # the builder's prefix; here it would look like a guard
                value.name = value.name.removeprefix("vlmguard/")
        for node in graph:
            node.name = (node.name or "").removeprefix("vlmguard/")

    def _weight(self, random: np.random.Generator, name: str, *dims: int) -> ir.Value:
        return self.builder.constant(name, random.normal(size=dims) / np.sqrt(dims[0]), "float32")

    def _skip_norm(self, number: int, stream: ir.Value, branch: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
        scale = self.builder.constant(f"{number}_scale", np.ones(width), "float32")
        normed, total = (
            ir.Value(name=f"{name}_{number}", type=stream.type, shape=stream.shape) for name in ("normed", "sum")
        )
        node = ir.Node(
            "com.microsoft",
            "SkipSimplifiedLayerNormalization",
            [stream, branch, scale],
            [ir.AttrFloat32("epsilon", 1e-6)],
            outputs=[normed, ir.Value(name=""), ir.Value(name=""), total],
            name=f"skip_norm_{number}",
        )
        self.builder.nodes.append(node)
        self.sites.append(node)
        return total, normed


def _mlp(width: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("down", (width, BOTTLENECK)), ("up", (BOTTLENECK, width))


def _shipped(width: int, guards: list[LayerGuard], positions: str, lowering: str) -> ir.Model:
    """The chain, guarded by the project's own rewrite."""
    chain = Chain(width, len(guards))
    sites = []
    for number, (node, guard) in enumerate(zip(chain.sites, guards, strict=True)):
        names = [
            value.name or "" for value in (node.outputs[0], node.outputs[3], *node.inputs[:2]) if value is not None
        ]
        sites.append(SitePlan(ResidualSite(number, "skip_norm", *names, "float32"), guard))
    mask = "attention_mask" if positions == "last" else ""
    rewrite(chain.model, GuardPlan("restore", positions, lowering, "", mask, width, len(guards), tuple(sites), ()))
    return chain.model


# The candidates


def _spelled(width: int, guards: list[LayerGuard], positions: str, spelling: Spelling) -> ir.Model:
    chain = Chain(width, len(guards))
    graph = chain.model.graph
    last = None
    if positions == "last":
        builder = NodeBuilder(graph, "positions")
        tokens = LastToken(builder, graph.inputs[0], CallInputs(graph.inputs[1]))
        pairs = tokens.pairs
        if spelling.gather == "sum":  # [batch, 1, 2]: what is gathered keeps the sequence axis
            pairs = builder.op("pairs_of_one", "Unsqueeze", [pairs, builder.integers(1)])
        if spelling.gather == "flat":  # [batch, 1]: row times sequence plus position
            row, place = (builder.op(f"pair_{n}", "Gather", [pairs, builder.integers(n)], axis=1) for n in (0, 1))
            shape = builder.op("flat_shape", "Shape", [graph.inputs[0]], start=1, end=2)
            pairs = builder.op("flat", "Add", [builder.op("flat_row", "Mul", [row, shape]), place])
        selection = builder.cast("selection", tokens.selected, "float32")
        last = pairs, tokens.selected, selection
        builder.place_before(chain.sites[0])
    for number, (node, guard) in enumerate(zip(chain.sites, guards, strict=True)):
        builder = NodeBuilder(graph, f"layer_{number}")
        _Site(builder, spelling, guard, last).correct(node)
        builder.place_before(node)
    return chain.model


@dataclass(frozen=True)
class _Site:
    """One site of a candidate; `last` is `(pairs, selected as bool, selected as float)` or `None` for all tokens."""

    builder: NodeBuilder
    spelling: Spelling
    guard: LayerGuard
    last: tuple[ir.Value, ir.Value, ir.Value] | None

    def correct(self, node: ir.Node) -> None:
        stream, branch = node.inputs[:2]
        assert stream is not None and branch is not None
        if self.last is not None and self.spelling.gather == "both":
            ends = [
                self._op(f"last_{name}", "GatherND", value, self.last[0])
                for name, value in (("r", stream), ("b", branch))
            ]
            total = self._op("sum", "Add", *ends)
        else:
            total = self._op("sum", "Add", stream, branch)
        read = total
        if self.last is not None and self.spelling.gather == "sum":
            read = self._op("last", "GatherND", total, self.last[0])
        if self.last is not None and self.spelling.gather == "flat":
            tokens = self._op("tokens", "Reshape", total, self.builder.integers(-1, self.guard.ssd.shape[1]))
            read = self.builder.op("last", "Gather", [tokens, self.last[0]], axis=0)
        delta = self._write(self._weights(read))
        if self.spelling.corrects == "branch":
            node.replace_input_with(1, self._op("guarded", "Add", branch, delta))
        else:
            node.replace_input_with(0, total)
            node.replace_input_with(1, delta)

    def _weights(self, h: ir.Value) -> ir.Value:
        """`[..., m]`, zero where the gate is closed; and, but for `both`, wherever the token is not the last."""
        c, score = self._read(h)
        target = self.guard.target if self.spelling.read != "padded" else np.append(self.guard.target, 0.0)
        wanted = self._op("difference", "Sub", self._number("target", target), c)
        early = self.last is not None and self.spelling.gather != "both"
        if self.spelling.gate == "where":
            opened = self._op("opens", "Greater", score, self._number("tau", np.array(self.guard.threshold)))
            if early and self.last is not None:
                opened = self._op("opens_at_last", "And", opened, self.last[1])
            return self._op("weights", "Where", opened, wanted, self._number("nothing", np.array(0.0)))
        if self.spelling.gate == "hard_sigmoid":
            slope = 2.0**60  # a power of two rounds nothing, so the sign of `slope * score - slope * tau` is exact
            offset = -slope * self.guard.threshold
            gate = self.builder.op("gate", "HardSigmoid", [score], alpha=slope, beta=offset)
        else:
            opened = self._op("opens", "Greater", score, self._number("tau", np.array(self.guard.threshold)))
            gate = self.builder.cast("gate", opened, "float32")
        if early and self.last is not None:
            gate = self._op("gate_at_last", "Mul", gate, self.last[2])
        return self._op("weights", "Mul", gate, wanted)

    def _read(self, h: ir.Value) -> tuple[ir.Value, ir.Value]:
        rank, rows = self.guard.rank, np.vstack([self.guard.ssd, self.guard.readout])
        if self.spelling.read == "two":
            c = self._op("read_c", "MatMul", h, self._number("rows_c", rows[:rank].T))
            return c, self._op("read_score", "MatMul", h, self._number("rows_score", rows[rank:].T))
        if self.spelling.read == "transposed":
            both = self._microsoft("FusedMatMul", [h, self._number("rows", rows[None])], transB=1)
        elif self.spelling.read == "unpacked":
            both = self._op("read", "MatMul", h, self._number("rows", rows.T[None]))
        else:
            both = self._op("read", "MatMul", h, self._number("rows", rows.T))
        if self.spelling.read == "padded":
            return both, self._columns("score", both, rank, rank + 1)
        if self.spelling.read == "slices":
            return self._columns("c", both, 0, rank), self._columns("score", both, rank, rank + 1)
        c, score = ir.Value(name=f"{self.builder.scope}/c"), ir.Value(name=f"{self.builder.scope}/score")
        sizes = self.builder.integers(rank, 1)
        split = ir.Node("", "Split", [both, sizes], [ir.AttrInt64("axis", -1)], outputs=[c, score])
        split.name = f"{self.builder.scope}/split"
        self.builder.nodes.append(split)
        return c, score

    def _write(self, weights: ir.Value) -> ir.Value:
        rows = self.guard.ssd
        if self.spelling.read == "padded":
            rows = np.vstack([rows, np.zeros_like(rows[:1])])
        if self.spelling.read in ("unpacked", "transposed"):
            rows = rows[None]
        delta = self._op("delta", "MatMul", weights, self._number("ssd", rows))
        if self.last is None or self.spelling.gather != "both":
            return delta
        column = self._op("delta_column", "Unsqueeze", delta, self.builder.integers(1))
        return self._op("delta_spread", "Mul", column, self.last[2])

    def _columns(self, name: str, value: ir.Value, start: int, stop: int) -> ir.Value:
        return self._op(name, "Slice", value, *(self.builder.integers(n) for n in (start, stop, -1)))

    def _op(self, name: str, operator: str, *inputs: ir.Value) -> ir.Value:
        return self.builder.op(name, operator, list(inputs))

    def _microsoft(self, operator: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        output = ir.Value(name=f"{self.builder.scope}/read")
        node = ir.node(operator, inputs, attributes, domain="com.microsoft", outputs=[output], name=output.name)
        self.builder.nodes.append(node)
        return output

    def _number(self, name: str, array: np.ndarray) -> ir.Value:
        return self.builder.constant(name, array, "float32")


# Running


def _numbers(seed: int, width: int, rank: int) -> LayerGuard:
    """A guard whose gate is open at about every second site; targets small beside the stream."""
    random = np.random.default_rng(seed)
    rows = np.linalg.qr(random.normal(size=(width, rank)))[0].T.astype(np.float32)
    readout = random.normal(size=width).astype(np.float32) / np.sqrt(width)
    target = random.normal(size=rank).astype(np.float32)
    return LayerGuard(rows, np.zeros(rank, np.float32), target, readout.astype(np.float32), 0.0, 1.0)


def _feeds(width: int, tokens: int, past: int) -> dict[str, np.ndarray]:
    stream = np.random.default_rng(1).normal(size=(1, tokens, width)).astype(np.float32)
    return {"stream": stream, "attention_mask": np.ones((1, past + tokens), np.int64)}


def _session(model: ir.Model, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        graph_bytes(model), session_options(threads), providers=["CPUExecutionProvider"]
    )


def _call(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> Callable[[], None]:
    binding = session.io_binding()
    used = {port.name for port in session.get_inputs()}
    for name, array in feeds.items():
        if name in used:
            binding.bind_cpu_input(name, array)
    for port in session.get_outputs():
        binding.bind_output(port.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def _require_agreement(outputs: dict[str, np.ndarray]) -> None:
    """Every guarded chain gives what `shipped lowrank` gives, and that differs from the unguarded one."""
    expected = outputs["shipped lowrank"]
    limit = AGREEMENT * float(np.abs(expected).max())
    moved = float(np.abs(expected - outputs["unguarded"]).max())
    if not moved > 100 * limit:
        raise AssertionError(f"the guard moved the chain by {moved:.1e}; a comparison of spellings would say nothing")
    for name, output in outputs.items():
        apart = float(np.abs(output - expected).max())
        if name != "unguarded" and not apart <= limit:
            raise AssertionError(f"{name}: differs from the shipped spelling by {apart:.1e}, limit {limit:.1e}")


if __name__ == "__main__":
    in_huge_pages()
    main()
