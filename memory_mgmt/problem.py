"""The planner's problem from one traced step: bytes and seconds of every layer's activations, and what a layer needs while it works.

The trace is of a baseline policy (``baseline_policy``): inputs and mixer outputs kept, the rest recomputed in tiles, which fits where
anything does. Bytes of the classes follow from shapes; working bytes and times are read off the trace, stage by stage, and carried over
to other tile sizes. What this gets wrong the caller corrects: it traces the chosen policy and solves again with what was missing.
Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memory_mgmt.activations import Shapes
from memory_mgmt.cost_model import Rates, Stretch, Topology, copy_seconds, step_schedule
from memory_mgmt.loss_costs import Head, seconds_in_tiles
from memory_mgmt.planner_problem import ClassCost, LayerCost, LossTile, Problem, Stage
from memory_mgmt.policy import KEEP_MIXER, ActivationClass, LayerPolicy, Policy
from memory_mgmt.quantised_costs import dequantise_seconds, packed_bytes, quantise_seconds
from memory_mgmt.trace import Trace
from models.config import FeedForwardKind, LayerKind, ModelConfig
from models.flops import ffn_parameters

GROUPS = (1, 2, 4)
_COPY = 1 << 30
_ATTENTION = ("attention", "c10d::send", "c10d::recv_", "c10d::alltoall_base_", "c10d::allgather_", "c10d::reduce_scatter_")
"""Part of a name of what only the mixer of an attention layer does (FSDP2's collectives have other names)."""


@dataclass(frozen=True)
class Setting:
    """What the problem is about besides the trace."""

    model: ModelConfig
    shapes: Shapes
    vocab_size: int
    rates: Rates
    topology: Topology
    budget_bytes: int
    """For what the trace counts: the limit less what a process holds beside its tensors."""
    host_bytes: int
    """Host memory this rank may take for offload; 0 forbids it."""
    host_limit_bytes: int
    """What a traced step may take of it: ``host_bytes`` and a margin for rounding."""
    step_tokens: int
    passes: int
    """Forward and backward passes in the trace."""
    quantise: tuple[ActivationClass, ...] = ()
    """Classes that may be kept in eight bits."""

    @property
    def ffn_tiles(self) -> tuple[int, ...]:
        """Candidates: the whole shard, and an eighth, a 32nd and a 128th of it, not below 256 tokens."""
        return tile_candidates(self.shapes.tokens)

    @property
    def memory_tiles(self) -> tuple[int, ...]:
        """The same for memory layers; a single 0 where there are none."""
        return tile_candidates(self.shapes.tokens) if "memory" in self.model.layer_kinds else (0,)

    @property
    def loss_tiles(self) -> tuple[int, ...]:
        """Candidates for the loss tile."""
        n = self.shapes.n
        return tuple(sorted({min(n, tile) for tile in (512, 2048, 8192)}))


def tile_candidates(tokens: int) -> tuple[int, ...]:
    """0 (no tiles) and powers of two from about an eighth down to a 128th of the shard, at least 256."""
    found = {1 << max(8, (tokens // parts).bit_length() - 1) for parts in (8, 32, 128)}
    return (0, *sorted(tile for tile in found if tile < tokens))


def baseline_policy(setting: Setting) -> Policy:
    """What is traced to set up the problem."""
    tiles = setting.ffn_tiles
    memory = setting.memory_tiles
    layers = tuple(
        KEEP_MIXER
        if kind != "memory"
        else LayerPolicy(KEEP_MIXER.input, KEEP_MIXER.projections, KEEP_MIXER.feed_forward, KEEP_MIXER.feed_forward)
        for kind in setting.model.layer_kinds
    )
    return Policy(layers, 1, setting.loss_tiles[len(setting.loss_tiles) // 2], tiles[len(tiles) // 2], memory[len(memory) // 2])


def problem_of_trace(trace: Trace, baseline: Policy, setting: Setting) -> Problem:
    """The problem whose baseline policy was traced."""
    reader = _Reader(trace, baseline, setting)
    costs = {i: reader.layer(i) for i in reader.representatives()}
    layers = tuple(costs[reader.represented_by(i)] for i in range(len(setting.model.layer_kinds)))
    # Waiting for parameters in backward is not part of a layer's seconds: what is chosen decides how long it is.
    waits = sum(reader.waited_in_backward(reader.represented_by(i)) for i in range(len(layers)))
    chosen = sum(layer.forward_seconds + layer.backward_seconds for layer in layers) + waits
    loss = reader.loss_seconds()
    recomputed = sum(layer.projections.recompute_seconds + layer.feed_forward.recompute_seconds for layer in layers)
    recomputed += sum(layer.mixer.recompute_seconds for layer in layers if layer.kind == "memory")
    one_way = _COPY / copy_seconds("copy_out", _COPY, setting.rates, setting.topology)
    other_way = _COPY / copy_seconds("copy_in", _COPY, setting.rates, setting.topology)
    return Problem(
        layers=layers,
        loss_tiles=tuple(LossTile(tile, reader.loss_bytes(tile), loss + reader.more_loss_seconds(tile)) for tile in setting.loss_tiles),
        resident_bytes=reader.resident,
        other_peak_bytes=reader.other_peak(),
        budget_bytes=setting.budget_bytes,
        host_bytes=max(0, setting.host_bytes - reader.states_on_host),
        bandwidth_out=one_way / setting.passes,
        bandwidth_in=other_way / setting.passes,
        passes=setting.passes,
        overlap=setting.rates.overlap,
        fixed_seconds=max(0.0, reader.total_seconds - chosen - loss - recomputed),
        step_tokens=setting.step_tokens,
        tokens=setting.shapes.tokens,
        share_tokens=max(1, setting.shapes.tokens // 64),
        ffn_tiles=setting.ffn_tiles,
        memory_tiles=setting.memory_tiles,
        group_blocks=tuple(k for k in GROUPS if k == 1 or 4 * k <= len(layers)),
        group_inside="one",  # memory_mgmt/groups.py
    )


Kinds = tuple[LayerKind, FeedForwardKind]


class _Reader:
    """Reads a traced step stage by stage."""

    def __init__(self, trace: Trace, baseline: Policy, setting: Setting) -> None:
        self.trace, self.baseline, self.setting = trace, baseline, setting
        self.schedule = step_schedule(trace, setting.rates, setting.topology)
        self.total_seconds = self.schedule[-1].end if self.schedule else 0.0
        self.resident = sum(b.size for b in trace.of("device") if b.lower == 0)
        self.states_on_host = sum(b.size for b in trace.of("host") if b.kind in ("optimizer", "parameter"))
        points = trace.curve()
        self.times, self.live = [time for time, _ in points], [live for _, live in points]

    # --- which layers --------------------------------------------------------------------------------------------------------

    def represented_by(self, i: int) -> int:
        """A layer of the same kinds in the middle of the model."""
        kinds = self.kinds
        same = [j for j, kind in enumerate(kinds) if kind == kinds[i]]
        return same[len(same) // 2]

    @property
    def kinds(self) -> list[Kinds]:
        """Of every layer: mixer, feed-forward."""
        return list(zip(self.setting.model.layer_kinds, self.setting.model.feedforward_kinds, strict=True))

    def representatives(self) -> set[int]:
        return {self.represented_by(i) for i in range(len(self.setting.model.layer_kinds))}

    # --- costs ------------------------------------------------------------------------------------------------------------------

    def layer(self, i: int) -> LayerCost:
        kind: LayerKind = self.setting.model.layer_kinds[i]
        classes = self.classes(self.kinds[i])
        forward, backward = self.stretch("forward", i), self.stretch("backward", i)
        again = classes["projections"].recompute_seconds + classes["feed_forward"].recompute_seconds
        again += classes["mixer"].recompute_seconds if kind == "memory" else 0.0
        stages = self.stages(i, self.kinds[i], classes)
        passes = self.setting.passes
        backward_seconds = passes * (backward.end - backward.start) - self.waited_in_backward(i) - again
        return LayerCost(
            kind=kind,
            input=classes["input"],
            projections=classes["projections"],
            mixer=classes["mixer"],
            feed_forward=classes["feed_forward"],
            forward_seconds=passes * (forward.end - forward.start),
            backward_seconds=max(backward_seconds, 0.0),
            fetch_seconds=passes * backward.copy_in,
            entrance_stages=stages["entrance_stages"],
            mixer_stages=stages["mixer_stages"],
            ffn_stages=stages["ffn_stages"],
            gradient_bytes=self.gradients(i),
        )

    def waited_in_backward(self, i: int) -> float:
        """For copies of parameters out of host memory: the baseline has no others."""
        return self.setting.passes * self.stretch("backward", i).waited_copy

    def classes(self, kinds: Kinds) -> dict[str, ClassCost]:
        """What the execution keeps of each class (memory_mgmt/execution.py), and the time to make it again."""
        kind, feed_forward = kinds
        found = self.dense_classes(kind)
        if feed_forward != "dense":
            # The stream before it is kept anyway, as if it were part of the input, which is not recomputed either.
            found["input"] = replace(found["input"], bytes=2 * found["input"].bytes)
            kept = self.setting.shapes.reader_kept(feed_forward) - self.setting.shapes.stream
            seconds = self.setting.passes * self.module_seconds(kinds)
            found["feed_forward"] = ClassCost(kept, seconds, may_swap=False, whole_recompute=True)
        return found

    def module_seconds(self, kinds: Kinds) -> float:
        """Forward of a feed-forward that is a module of its own, with its messages."""
        i = self.represented_by(self.kinds.index(kinds))
        return sum(work.seconds for work in self.stretch("forward", i).work if work.op.module.startswith(f"blocks.{i}.ffn"))

    def dense_classes(self, kind: LayerKind) -> dict[str, ClassCost]:
        """Of a layer whose feed-forward is token-wise."""
        s, c, passes = self.setting.shapes, self.setting.model, self.setting.passes
        queries, keys = c.n_heads * c.attention_head_dim, c.kv_heads * c.attention_head_dim
        leave = self.product_seconds(2 * s.n * ffn_parameters(c) * 2 // 3)
        block_input = ClassCost(s.stream, passes * leave / 2, may_recompute=False)  # inside a group: the product that ends the block below
        if kind == "memory":
            inside = s.memory_inside()
            tokens_seconds = self.memory_seconds()
            return {
                "input": block_input,
                "projections": ClassCost(),
                "mixer": ClassCost(inside, tokens_seconds, tiled_bytes=0),
                "feed_forward": self.packable(ClassCost(s.stream + 2 * s.n * c.ff_width * s.e, passes * leave, tiled_bytes=0)),
            }
        project = self.product_seconds(2 * s.n * c.d_model * (queries + 2 * keys))
        output = self.product_seconds(2 * s.n * c.d_model * queries)
        return {
            "input": block_input,
            "projections": ClassCost(s.n * (queries + 2 * keys) * s.e, passes * project),
            "mixer": ClassCost(s.n * (queries * s.e + c.n_heads * s.w), passes * self.attention_seconds(), whole_recompute=True),
            "feed_forward": self.packable(
                ClassCost(s.stream + s.statistic + 2 * s.n * c.ff_width * s.e, passes * (leave + output), tiled_bytes=0)
            ),
        }

    def packable(self, feed_forward: ClassCost) -> ClassCost:
        """With the costs of eight bits where they are allowed: of the stream, gate and up."""
        if "feed_forward" not in self.setting.quantise:
            return feed_forward
        s, c = self.setting.shapes, self.setting.model
        parts = ((c.d_model, s.r), (c.ff_width, s.e), (c.ff_width, s.e))

        def seconds(of: Callable[[int, int, Rates, bool], float]) -> float:
            return self.setting.passes * self.sharing * sum(of(s.n * width, size, self.setting.rates, s.cuda) for width, size in parts)

        return replace(
            feed_forward,
            quantised_bytes=sum(packed_bytes(s.n, width, size) for width, size in parts),
            quantise_seconds=seconds(quantise_seconds),
            dequantise_seconds=seconds(dequantise_seconds),
        )

    def product_seconds(self, flops: int) -> float:
        return self.setting.rates.of(self.setting.rates.matmul, self.setting.shapes.precision).seconds(flops) * self.sharing

    @property
    def sharing(self) -> int:
        return self.setting.topology.ranks_per_node if self.setting.rates.shared else 1

    def attention_seconds(self) -> float:
        """The mixer's share of an attention layer's forward pass, communication that it waits for included."""
        found = [i for i, kind in enumerate(self.setting.model.layer_kinds) if kind != "memory"]
        stretch = self.stretch("forward", self.represented_by(found[0])) if found else None
        if stretch is None:
            return 0.0
        return sum(work.seconds for work in stretch.work if "attention" in work.op.name) + stretch.waited_communication

    def memory_seconds(self) -> float:
        """Forward of a memory layer's inside."""
        i = self.setting.model.layer_kinds.index("memory")
        i = self.represented_by(i)
        stretch = self.stretch("forward", i)
        token_wise = self.product_seconds(2 * self.setting.shapes.n * ffn_parameters(self.setting.model))
        if self.kinds[i][1] != "dense":
            token_wise = self.module_seconds(self.kinds[i])
        return self.setting.passes * max(0.0, stretch.end - stretch.start - token_wise)

    def stretch(self, phase: str, i: int) -> Stretch:
        """The first stretch of a layer in a phase."""
        return next(s for s in self.schedule if s.label == f"{phase} blocks.{i}")

    def loss_seconds(self) -> float:
        return sum(s.end - s.start for s in self.schedule if s.label.startswith("loss") or s.label == "backward head")

    def more_loss_seconds(self, tile: int) -> float:
        """What a loss tile of so many tokens costs over the traced one; may be negative."""
        setting, n = self.setting, self.setting.shapes.n
        head = Head(setting.vocab_size * setting.model.d_model, setting.shapes.e, setting.shapes.w)
        ops = [work.op for stretch in self.schedule if stretch.label.startswith("loss") for work in stretch.work]
        turns, wanted = (-(-n // size) for size in (self.baseline.loss_tile_tokens, tile))
        times = (seconds_in_tiles(ops, head, turns, count, setting.rates, setting.topology) for count in (wanted, turns))
        return next(times) - next(times)

    # --- bytes ------------------------------------------------------------------------------------------------------------------

    def span(self, label: str) -> tuple[int, int]:
        """(first, last + 1) event of the first stretch with this label."""
        for k, (start, name) in enumerate(self.trace.marks):
            if name == label:
                return start, self.trace.marks[k + 1][0] if k + 1 < len(self.trace.marks) else self.trace.end
        raise ValueError(f"the trace has no stretch '{label}'")

    def top(self, start: int, end: int) -> int:
        """The most live bytes in [start, end)."""
        first, last = max(0, bisect_right(self.times, start) - 1), bisect_left(self.times, end)
        return max(self.live[first : max(last, first + 1)], default=0)

    def kept_below(self, i: int) -> int:
        """What the baseline holds of layers 0 to i - 1."""
        return sum(self.kept(self.kinds[j]) for j in range(i))

    def kept(self, kinds: Kinds) -> int:
        classes = self.bytes_of(kinds)
        return classes["input"] + (classes["mixer"] if kinds[0] != "memory" else 0)

    def bytes_of(self, kinds: Kinds) -> dict[str, int]:
        return {name: cost.bytes for name, cost in self.classes(kinds).items()}

    def gradients(self, i: int) -> int:
        """What the layer's backward pass leaves behind: nothing where it updates too and the gradients were made in it."""
        forwards = [time for time, label in self.trace.marks if label.startswith("forward")]
        return sum(
            b.size
            for b in self.trace.of("device")
            if b.kind == "gradient" and b.layer == i and b.lower > 0
            if b.freed_in != "backward" or any(b.lower < time < b.upper for time in forwards)
        )

    def gradients_above(self, i: int) -> int:
        return sum(self.gradients(j) for j in range(i + 1, len(self.setting.model.layer_kinds)))

    def stages(self, i: int, kinds: Kinds, classes: dict[str, ClassCost]) -> dict[str, tuple[Stage, ...]]:
        kind, feed_forward = kinds
        size = {name: cost.bytes for name, cost in classes.items()}
        forward, backward = self.parts("forward", i, kind), self.parts("backward", i, kind)
        below = self.resident + self.kept_below(i)
        above = below + self.gradients_above(i)
        beside = {  # (in forward, in backward): classes that are there in the stage anyway
            "entrance": (size["input"] + size["projections"], size["input"]),
            "mixer": (size["input"] + size["projections"] + size["mixer"],) * 2,
            "ffn": (size["input"] + size["projections"] + size["mixer"],) * 2,
        }
        tile = self.baseline.ffn_tile_tokens
        found: dict[str, tuple[Stage, ...]] = {}
        for name, (in_forward, in_backward) in beside.items():
            tiled = kind == "memory" and name == "mixer"
            base = Stage(max(0, forward[name] - below - in_forward), max(0, backward[name] - above - in_backward))
            if kind == "memory" and name == "mixer":
                base = Stage(max(0, forward[name] - below - size["input"]), max(0, backward[name] - above - size["input"]))
            if name == "ffn" and feed_forward != "dense":  # it has tiles of its own
                found["ffn_stages"] = (base,)
                continue
            found[f"{name}_stages"] = self.other_tiles(base, name, self.baseline.memory_tile_tokens if tiled else tile, tiled)
        return found

    def parts(self, phase: str, i: int, kind: LayerKind) -> dict[str, int]:
        """The most live bytes in each stage of a layer."""
        start, end = self.span(f"{phase} blocks.{i}")
        marks = [op.time for op in self.trace.ops if start <= op.time < end and any(word in op.name for word in _ATTENTION)]
        if kind == "memory" or not marks:
            return dict.fromkeys(("entrance", "mixer", "ffn"), self.top(start, end))
        first, last = self.top(start, min(marks)), self.top(max(marks), end)
        between = self.top(min(marks), max(marks) + 1)
        return {"entrance": first if phase == "forward" else last, "mixer": between, "ffn": last if phase == "forward" else first}

    def other_tiles(self, base: Stage, name: str, traced_tile: int, memory: bool) -> tuple[Stage, ...]:
        """The stage under every candidate tile, from what one tile's inside takes by shape."""
        setting = self.setting
        if name == "mixer" and not memory:
            return (base,)
        tiles = setting.memory_tiles if memory else setting.ffn_tiles
        if len(tiles) == 1:
            return (base,)
        shapes = setting.shapes
        factor = 1.0 if memory or name == "ffn" else 0.3  # norm and projections are narrower than a feed-forward

        def inside(tile: int) -> int:
            return int(factor * shapes.tile_inside(min(tile or shapes.tokens, shapes.tokens), memory=memory))

        stages = []
        for tile in tiles:
            more = inside(tile) - inside(traced_tile)
            launches = 0 if tile == 0 else 60 * setting.passes * -(-shapes.tokens // tile)
            seconds = launches * setting.rates.launch_seconds
            stages.append(Stage(max(0, base.forward_bytes + more // 2), max(0, base.backward_bytes + more), seconds))
        return tuple(stages)

    def loss_bytes(self, tile: int) -> int:
        """Beside what is resident and kept, for a loss tile of so many tokens."""
        s = self.setting.shapes
        traced = max(self.top(*self.span(label)) for label in {name for _, name in self.trace.marks} if label.startswith("loss"))
        kept = self.kept_below(len(self.setting.model.layer_kinds))
        per_token = self.setting.vocab_size * (2 * s.w + s.e)
        return max(0, traced - self.resident - kept + (tile - self.baseline.loss_tile_tokens) * per_token)

    def other_peak(self) -> int:
        """The most that is live in clipping and update."""
        peaks = [self.top(start, end) for start, end in self._spans(("clip", "update"))]
        return max(peaks, default=0)

    def _spans(self, phases: Sequence[str]) -> list[tuple[int, int]]:
        marks = [*self.trace.marks, (self.trace.end, "")]
        return [(start, marks[k + 1][0]) for k, (start, label) in enumerate(marks[:-1]) if label.split(" ")[0] in phases]
