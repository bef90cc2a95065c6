"""How one parameter is updated: by which rule or method, with which codecs, written how, by which kernel."""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from models.parts import Part
from optim import fused_low_rank
from optim.clip import local_part
from optim.codecs import Codec
from optim.elementwise import Rule, Storage
from optim.fused import Kernel, Path, path_for
from optim.methods import Method, Projecting, StateSpec, Steps
from optim.placement import Placed
from optim.redealt import Redealt, to_rows
from optim.row_sparse import RowSparse
from optim.stacking import as_rows
from optim.updates import Update
from optim.writers import EXACT, WRITERS, Chance, Weights, Writer, writer_for


@dataclass
class Lane:
    """One parameter, how it is updated and how its states are kept."""

    name: str
    parameter: torch.nn.Parameter
    rule: Rule | Method
    storage: Storage
    weights: Weights | None = None
    """How a parameter of few bits is written (``optim/writers.py``)."""
    seed: int = 0
    """Of the chance by which it is rounded."""
    asked: Storage | None = None
    """Where it is not ``storage``: what was asked for and cannot be."""
    part: Part | None = None
    """Which part the parameter is of one that tensor-parallel ranks share."""
    kernel: Kernel = "auto"
    """What is asked for where moments are in few bits."""
    path: Path = field(init=False)
    """By what it is updated, and ``eager_because``, why not by a kernel (``optim/fused.py``)."""
    eager_because: str = field(init=False)
    redealt: Redealt | None = field(default=None, init=False)
    """Of a part whose method updates whole matrices: how it becomes rows of the whole."""
    key: int = field(init=False)
    """The same on every mesh and in every process."""
    is_method: bool = field(init=False)
    """Updated as a whole matrix, not element by element."""
    kind: int = field(default=0, init=False)
    """Equal where ``alike`` is."""
    placed: Placed = field(init=False)
    specs: dict[str, StateSpec] = field(init=False)
    codecs: dict[str, Codec] = field(init=False)
    """Of the states that are not kept as they are."""
    parts: dict[str, dict[str, str]] = field(init=False)
    """Of those: part -> its name in ``state``."""
    kept: dict[str, StateSpec] = field(init=False)
    """Every tensor that is kept, by its name in ``state``."""
    summed: Tensor | None = field(default=None, init=False)
    """The gradient's coordinates, where those of several micro-batches were summed: stepped from instead of the gradient."""
    writer: Writer = field(init=False)

    def __post_init__(self) -> None:
        self.writer = writer_for(self.parameter, self.weights, self.name)
        if isinstance(self.rule, RowSparse) and self.writer is not EXACT:
            raise ValueError(f"{self.name} is a table, whose rows are updated apart, in float32 only; set weights (optim.weights) fp32")
        self.key, self.is_method = zlib.crc32(self.name.encode()), hasattr(self.rule, "step")
        self.placed = Placed.of(self.parameter, self.part)
        if self.is_method and self.part is not None:
            self._deal_anew(self.part)
        self.specs = dict(self.rule.states(self.placed.shape))  # pyright: ignore[reportArgumentType]
        self.codecs = {}
        if self.dtype == torch.float32:
            found = {name: self.placed.codec(self.storage, spec, self.name) for name, spec in self.specs.items()}
            self.codecs = {name: codec for name, codec in found.items() if codec is not None}
        self.parts = {name: {part: f"{name}.{part}" for part in codec.parts(self.specs[name].shape)} for name, codec in self.codecs.items()}
        self.kept = self._kept()
        self.path, self.eager_because = self._path()

    def _deal_anew(self, part: Part) -> None:
        if self.writer not in (EXACT, WRITERS["bf16"]):
            raise ValueError(
                f"{self.name} is a part of a matrix that {part.ranks} tensor-parallel ranks share and update whole, and its weights are "
                "rounded by their place or kept with a correction; set optim.weights to fp32 or bf16"
            )
        self.redealt = Redealt.of(self.parameter, part)
        self.placed = self.redealt.placed(part)

    def lie_as(self, placed: Placed) -> None:
        """Plan for another rank: its part, and states of that."""
        self.placed = placed
        self.specs = dict(self.rule.states(placed.shape))  # pyright: ignore[reportArgumentType]
        self.kept = self._kept()
        self.path, self.eager_because = self._path()

    def _path(self) -> tuple[Path, str]:
        if self.kernel == "eager":
            return "eager", "as asked for"
        if not self.is_method or fused_low_rank.known(self.rule) is None:
            return path_for(self.rule, self.codecs, self.parameter.device, self.dtype)
        if self.writer is not EXACT or self.parameter.dtype != torch.float32:
            return "eager", "weights are not float32"
        if self.placed.rows.ranks > 1:
            return "eager", "ranks share the matrix"
        if self.placed.group is not None:
            return "eager", "replicas step alike, also where one of their machines has no compiler"
        return fused_low_rank.path_for(self.parameter.device)

    @property
    def renewal_cost(self) -> float:
        """Of a renewal, beside those of the same method."""
        of_shape = getattr(self.rule, "renewal_cost", None)
        return 1.0 if of_shape is None else of_shape(self.placed.shape)

    def take_turn(self, before: float, total: float) -> None:
        """Come after matrices of the same method whose renewals cost ``before``, ``total`` all of them: where the gap allows, no other is
        renewed in the same steps, and after dear ones there is a longer pause."""
        gap = getattr(self.rule, "gap", 1)
        self.key += int(before * gap // total) - self.key % gap

    def alike(self) -> Hashable:
        """Equal for lanes whose rows can be updated as those of one tensor."""
        codecs = tuple((name, codec.name) for name, codec in self.codecs.items())
        parameter = self.parameter
        return self.rule, self.storage, codecs, self.writer, parameter.dtype, parameter.device, self.placed.shape[1:]

    def stack(self) -> Hashable:
        """Equal for lanes that may be updated as one; what is rounded by its place in its own parameter stays apart."""
        return self.kind if self.writer is EXACT else self.name

    def local_size(self) -> int:
        """Elements of this rank's part."""
        return local_part(self.parameter).numel()

    @property
    def has_gradient(self) -> bool:
        """Whole, or in coordinates."""
        return self.parameter.grad is not None or self.summed is not None

    def weight(self, stored: dict[str, Tensor]) -> Tensor:
        """This rank's rows before the step; of a matrix that is dealt anew all ranks must ask."""
        held = self.writer.read(local_part(self.parameter), stored)
        return held if self.redealt is None or self.placed.group is None else to_rows([held], [self.redealt], self.placed.group)[0]

    def gradient(self) -> Tensor:
        """This rank's part, in the dtype in which the update is computed."""
        return local_part(cast(Tensor, self.parameter.grad)).to(self.dtype)

    def method_step(self, gradient: Tensor | None, states: dict[str, Tensor], step: int) -> Steps:
        """One step of a method, from this rank's rows of the gradient, or what was summed of it."""
        if self.summed is not None:
            rule = cast(Projecting, self.rule)
            return rule.lifted(self.summed, states, self.placed.rows, self.placed.shape[1], step, self.key)
        return cast(Method, self.rule).step(cast(Tensor, gradient), states, self.placed.rows, step, self.key)

    @property
    def dtype(self) -> torch.dtype:
        """In which the update is computed: float32, and float64 for elements of that."""
        return torch.float32 if self.is_method or self.parameter.dtype != torch.float64 else torch.float64

    def stored(self) -> dict[str, StateSpec]:
        """Every tensor that is kept, by its name in ``state``."""
        return self.kept

    def _kept(self) -> dict[str, StateSpec]:
        found: dict[str, StateSpec] = {}
        for name, spec in self.specs.items():
            if name in self.codecs:
                for part, (shape, dtype) in self.codecs[name].parts(spec.shape).items():
                    found[self.parts[name][part]] = StateSpec(shape, spec.placement, dtype)
            else:
                wide = self.dtype if spec.dtype == torch.float32 else spec.dtype
                found[name] = StateSpec(spec.shape, spec.placement, wide, spec.codec)
        return found | dict(self.writer.states(self.placed.shape))

    def write_(self, rows: slice, stored: dict[str, Tensor], update: Update, lr: float, decay: float, step: int) -> None:
        """Put ``update`` into ``rows`` of this rank's part; ``stored``: those rows of what is kept."""
        weight = as_rows(local_part(self.parameter))[rows]
        beside = {name: stored[name] for name in self.writer.states(self.placed.shape)}
        first = (self.placed.rows.first + rows.start) * torch.Size(self.placed.shape[1:]).numel()
        self.writer.write_(weight, beside, update, lr, decay, Chance(self.seed, self.key, step, first))

    def planned_bytes(self) -> int:
        """Of this rank's states, the step counter included."""
        sizes = [torch.Size(self.placed.local_shape(spec)).numel() * spec.dtype.itemsize for spec in self.stored().values()]
        return sum(sizes) + torch.float32.itemsize
