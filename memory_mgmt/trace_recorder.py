"""Record every allocation, free and operation of a training step, on fake tensors (nothing is computed or held) or real ones.

One dispatch mode sees every operator below autograd. A buffer lives as long as its storage: it begins when an operator returns a
storage not seen before, or when ``UntypedStorage.resize_`` fills one (FSDP2 empties and refills its gathered parameters so), and
ends when the storage dies or is resized to nothing. Hooks on the blocks say which layer is running, forward or backward.

What operators allocate inside their kernels and free before they return is added by ``op_workspace.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from memory_mgmt.op_costs import op_bytes, op_flops, work_dtype, written
from memory_mgmt.op_kernels import onednn_kernels
from memory_mgmt.op_workspace import workspace_bytes
from memory_mgmt.trace import Phase, Place, Trace, TracedBuffer, TracedOp, TraceKind
from models.int8_weight import Int8Weight
from models.memory.protocol import MemoryModule
from models.repeat import AGAIN, IN_FLIGHT, TURNS
from models.transformer import Transformer

CUDA_BLOCK = 512
"""Smallest unit of torch's CUDA caching allocator (kMinBlockSize)."""
_ITEM = "aten::_local_scalar_dense"
_OF_LISTS = ("aten::_foreach_", "aten::_fused_")
_DEVICE = torch.ops.prim.device.default
_COLLECTIVE_SPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_COMMUNICATION_SPACES = (*_COLLECTIVE_SPACES, "fsdp")


@dataclass(frozen=True)
class Region:
    """What is running: a phase, and the layer if it is one layer's."""

    phase: Phase
    layer: int | None
    module: str

    @property
    def label(self) -> str:
        """For people and for grouping: ``forward blocks.3``."""
        return f"{self.phase} {self.module}".strip()


class StepRecorder(TorchDispatchMode):
    """Records while it is entered; ``trace()`` gives what was recorded since ``start_step``.

    ``device_type``: where the model lives (``cpu`` or ``cuda``); tensors on the CPU beside a CUDA model count as host memory.
    ``threads``: of a CPU rank, for the scratch memory of its kernels.
    """

    def __init__(self, device_type: str, threads: int = 1) -> None:
        super().__init__()
        self.device_type = device_type
        self._threads = threads
        self._round = CUDA_BLOCK if device_type == "cuda" else 1
        self._clock = 0
        self._live: dict[int, TracedBuffer] = {}
        self._known: set[int] = set()
        self._buffers: list[TracedBuffer] = []
        self._ops: list[TracedOp] = []
        self._kernels: dict[Hashable, int] = {}
        self._streams: dict[int, str] = {0: "compute"}
        self._marks: list[tuple[int, Region]] = []
        self._region = Region("build", None, "")
        self._modules: list[str] = []
        self._host_depth = 0
        self._finished = False
        self._resize: Any = None
        self.regions_of: dict[int, tuple[Region, Region | None]] = {}
        """Buffer id -> region in which it was made and freed."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: torch's guard around every call costs as much as recording does."""
        return False

    # --- where we are -------------------------------------------------------------------------------------------------------

    def enter(self, phase: Phase, layer: int | None = None, module: str = "") -> None:
        """From now on this is running."""
        region = Region(phase, layer, module)
        if region != self._region:
            self._region = region
            self._marks.append((self._clock + 1, region))

    def watch(self, model: Transformer) -> None:
        """Follow which block of ``model`` is running, by hooks that stay on it."""
        blocks = list(model.blocks)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(i))
            block.register_forward_hook(self._leaving(i, last=i == len(blocks) - 1))
            for name, module in block.named_modules():
                if name:
                    self._follow(module, f"blocks.{i}.{name}")

    def _entering(self, i: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            # A block that runs again in the backward pass belongs to it; of a group of blocks it is what comes first there.
            again = _in_backward()
            self.enter("backward" if again else "forward", i, f"blocks.{i}")
            if i == 0 and not again and args[0].requires_grad:
                args[0].register_hook(lambda _grad: self.enter("backward", None, "embed"))

        return hook

    def _leaving(self, i: int, last: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda _grad: self.enter("backward", i, f"blocks.{i}"))
            if last and not _in_backward():
                self.enter("loss", None, "head")

        return hook

    def _follow(self, module: nn.Module, path: str) -> None:
        module.register_forward_pre_hook(lambda _module, _args: self._modules.append(path))

        def leave(module: nn.Module, _args: Any, out: Any) -> None:
            if self._modules and self._modules[-1] == path:
                self._modules.pop()
            if isinstance(module, MemoryModule) and out is not None:
                self.tag(tree_iter(out[1]), "state")

        # Always: what runs again in the backward pass is broken off where no more of it is wanted, without a result.
        module.register_forward_hook(leave, always_call=True)

    # --- what is there already ------------------------------------------------------------------------------------------------

    def adopt(self, tensors: Iterable[tuple[str, Tensor]], kind: TraceKind) -> None:
        """Note tensors that exist already, by parameter name; those seen before only get the kind and the name."""
        for name, tensor in tensors:
            for local in _tensors((_local(tensor),)):
                buffer = self._live.get(_key(local)) or self._begin(local, "found")
                if buffer is not None:
                    buffer.kind, buffer.module = kind, name
                    buffer.layer = layer_of(name)

    def tag(self, tensors: Iterable[Any], kind: TraceKind) -> None:
        """Set the kind of live tensors."""
        for tensor in tensors:
            for local in _tensors((_local(tensor),) if isinstance(tensor, Tensor) else ()):
                buffer = self._live.get(_key(local))
                if buffer is not None:
                    buffer.kind = kind

    def _tag_message(self, tensors: Iterable[Tensor]) -> None:
        """What a collective reads and writes is a communication buffer, unless it is a parameter or another thing with a name."""
        for tensor in tensors:
            buffer = self._live.get(_key(tensor))
            if buffer is not None and buffer.kind == "transient":
                buffer.kind = "communication"

    def host_empty(self, size: int) -> Tensor:
        """Fake host memory of ``size`` bytes that counts as such also where the device is the CPU."""
        self._host_depth += 1
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        finally:
            self._host_depth -= 1

    def start_step(self) -> None:
        """Forget what was recorded, keep what is live: it is there at the beginning of the step."""
        self._clock = 0
        self._buffers = list(self._live.values())
        self._ops, self._marks = [], [(0, self._region)]
        self._kernels = {}
        self.regions_of = {}
        for i, buffer in enumerate(self._buffers):
            buffer.id, buffer.lower, buffer.upper, buffer.freed_in = i, 0, -1, None

    # --- recording --------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> StepRecorder:
        self._resize = torch.UntypedStorage.resize_
        recorder = self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = recorder._resize(storage, size)
            if storage._cdata in recorder._known:
                recorder._end(storage._cdata)
                if size:
                    recorder._refill(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resize_  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor) and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # C++ asks about as often as it does everything else together
        if any(issubclass(t, (DTensor, Int8Weight)) for t in types):
            return NotImplemented  # let it become operations on local shards, or on the bytes of weights, first
        kwargs = kwargs or {}
        name = func._schema.name
        if name == _ITEM:  # values do not exist: a count is 1, a norm is 1.0
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **kwargs)
        if name.startswith("prim::"):
            return out
        inputs, outputs = list(_tensors((*args, *kwargs.values()))), list(_tensors((out,)))
        layer = self._region.layer if self._region.layer is not None else self._inherited(inputs)
        listed = self._region.layer is None and isinstance(out, (list, tuple)) and len(inputs) >= len(outputs)
        for i, x in enumerate(outputs):
            # Of a list of results (torch._foreach) each belongs to the layer of the input in its place.
            self._begin(x, name, self._inherited(inputs[i : i + 1]) if listed else layer)
        space = name.partition("::")[0]
        if space in _COMMUNICATION_SPACES:
            self._tag_message((*inputs, *outputs))
        if space in _COLLECTIVE_SPACES:
            self._collective(name, inputs, args, layer)
        else:
            if self.device_type == "cpu":
                self._kernels.update([onednn_kernels(name, args)])
            scratch = workspace_bytes(name, args, kwargs, self.device_type, self._threads)
            if scratch:
                self._scratch(name, scratch, layer)
            self._operation(func, name, inputs, outputs, args, kwargs, out, layer)
        return out

    def _inherited(self, inputs: Sequence[Tensor]) -> int | None:
        """Outside the layers (clipping, update) an operation belongs to the layer of the first tensor that belongs to one."""
        for x in inputs:
            buffer = self._live.get(_key(x))
            if buffer is not None and buffer.layer is not None:
                return buffer.layer
        return None

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _begin(self, x: Tensor, op: str, layer: int | None = None) -> TracedBuffer | None:
        if x.device.type not in (self.device_type, "cpu"):
            return None
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return None
        self._known.add(key)
        weakref.finalize(storage, self._died, key)
        host = self.device_type != "cpu" and x.device.type == "cpu"
        return self._new(key, storage.nbytes(), op, layer, "host" if host or self._host_depth else "device")

    def _refill(self, key: int, size: int) -> None:
        self._new(key, size, "resize_", self._region.layer, "device")

    def _new(self, key: int | None, size: int, op: str, layer: int | None, place: Place) -> TracedBuffer:
        unit = self._round if place == "device" else 1
        module = self._modules[-1] if self._modules else self._region.module
        buffer = TracedBuffer(
            id=len(self._buffers),
            lower=self._tick(),
            upper=-1,
            size=-(-size // unit) * unit,
            requested=size,
            kind="transient",
            op=op,
            module=module,
            layer=self._region.layer if layer is None else layer,
            phase=self._region.phase,
            freed_in=None,
            place=place,
            stream=self._stream() if place == "device" else "compute",
        )
        self._buffers.append(buffer)
        self.regions_of[buffer.id] = (self._region, None)
        if key is not None:
            self._live[key] = buffer
        return buffer

    def _stream(self) -> str:
        """The stream whose pool a tensor comes from that is allocated now."""
        if self.device_type == "cpu":
            return "compute"
        return self._streams.setdefault(torch.cuda.current_stream().cuda_stream, f"side {len(self._streams)}")

    def _scratch(self, op: str, size: int, layer: int | None) -> None:
        buffer = self._new(None, size, op, layer, "device")
        buffer.kind = "workspace"
        self._close(buffer)

    def _died(self, key: int) -> None:
        self._known.discard(key)
        if not self._finished:
            self._end(key)

    def _end(self, key: int) -> None:
        buffer = self._live.pop(key, None)
        if buffer is not None:
            self._close(buffer)

    def _close(self, buffer: TracedBuffer) -> None:
        buffer.upper, buffer.freed_in = self._tick(), self._region.phase
        self.regions_of[buffer.id] = (self.regions_of.get(buffer.id, (self._region, None))[0], self._region)

    def _operation(
        self, func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any, out: Any, layer: int | None
    ) -> None:
        outputs = outputs or written(func, args)
        if self._region.layer is None and name.startswith(_OF_LISTS):
            for one, read, made in self._by_layer(inputs, outputs):
                self._ops.append(self._op(name, one, 0, op_bytes(func, read, made), work_dtype(inputs), "compute"))
            return
        moved = op_bytes(func, inputs, outputs)
        if not moved:
            return
        flops = op_flops(func, args, kwargs, out)
        stream = "compute"
        if self.device_type != "cpu" and outputs and len({x.device.type for x in (*inputs, *outputs)}) > 1:
            stream = "copy_out" if outputs[0].device.type == "cpu" else "copy_in"
        op = self._op(name, layer, flops, moved, work_dtype(inputs or outputs), stream)
        if stream != "compute":  # a copy names its target among its inputs too
            op.message_bytes = sum(x.numel() * x.element_size() for x in outputs) * op.repeats
        self._ops.append(op)

    def _by_layer(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Iterator[tuple[int | None, list[Tensor], list[Tensor]]]:
        """What one operation on the tensors of many layers reads and writes of each, so that layers that are not traced can be added."""
        found: dict[int | None, tuple[list[Tensor], list[Tensor]]] = {}
        for side, tensors in enumerate((inputs, outputs)):
            for x in tensors:
                found.setdefault(self._inherited([x]), ([], []))[side].append(x)
        for layer, (read, made) in found.items():
            yield layer, read, made

    def _collective(self, name: str, inputs: list[Tensor], args: Any, layer: int | None) -> None:
        # Each list or tensor among the arguments is one side of the message; the larger one is the whole.
        sides = [sum(x.numel() * x.element_size() for x in _tensors((argument,))) for argument in args]
        op = self._op(name, layer, 0, sum(sides), work_dtype(inputs), "communication")
        op.group_size, op.group_stride = max((_group(x) for x in args), default=(1, 0))
        op.message_bytes = max(sides, default=0) * op.repeats
        op.in_flight = IN_FLIGHT.get()
        self._ops.append(op)

    def _op(self, name: str, layer: int | None, flops: int, moved: int, dtype: str, stream: str) -> TracedOp:
        turns = TURNS.get()
        return TracedOp(
            time=self._tick(),
            name=name,
            module=self._modules[-1] if self._modules else self._region.module,
            layer=layer,
            phase=self._region.phase,
            flops=flops * turns,
            bytes=moved * turns,
            dtype=dtype,
            recompute=AGAIN.get() or (_in_backward() and bool(self._modules)),
            stream=stream,
            repeats=turns,
        )

    # --- the result ---------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The step is over: what dies from now on outlived it."""
        self._finished = True

    def trace(self) -> Trace:
        """The finished step; what is still live ends with it."""
        self.finish()
        end = self._tick() + 1
        for buffer in self._live.values():
            buffer.upper, buffer.freed_in = end, None
        for buffer in self._buffers:
            if buffer.kind == "transient":
                buffer.kind = _kind(buffer)
        marks = [(time, region.label) for time, region in self._marks]
        return Trace(self.device_type, self._buffers, self._ops, marks, end, {"onednn_kernels": sum(self._kernels.values())})

    @property
    def regions(self) -> list[tuple[int, Region]]:
        """(time, what begins to run then), for the extension to more layers."""
        return self._marks


def layer_of(name: str) -> int | None:
    """The block index in a parameter or module path such as ``blocks.3.ffn``."""
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 1 and parts[0] == "blocks" and parts[1].isdigit() else None


def _kind(buffer: TracedBuffer) -> TraceKind:
    if buffer.phase == "loss":
        return "loss"
    if buffer.phase == "forward" and buffer.freed_in not in ("forward", None):
        return "skeletal"
    return "transient"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def _local(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "_local_tensor", None)
    local = tensor if local is None else local
    return local.packed if isinstance(local, Int8Weight) else local


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors in arguments or results, lists and tuples opened, sparse ones as their parts; much faster than the general tree walk."""
    for value in values:
        if isinstance(value, Tensor):
            yield from (value._indices(), value._values()) if value.layout is torch.sparse_coo else (value,)
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _group(x: Any) -> tuple[int, int]:
    """(ranks, distance of neighbours) of the process group among an operator's arguments; (1, 0) for other arguments."""
    if not isinstance(x, torch.ScriptObject) or "ProcessGroup" not in x._type().qualified_name():
        return 1, 0
    group = dist.ProcessGroup.unbox(x)
    ranks = dist.get_process_group_ranks(group)
    strides = {b - a for a, b in pairwise(ranks)}
    return group.size(), strides.pop() if len(strides) == 1 else 0
