"""Affine memories on the kernels of flash-linear-attention against their token recurrences in float64. Prints one line of JSON: of every
case the relative errors of output, state and gradients; in the interpreter also by how much a plan is off their memory.

    TRITON_INTERPRET=1 python tests/models/memory/fla_run.py cpu       the kernels in triton's interpreter, in float32
    python tests/models/memory/fla_run.py cuda                         on a GPU, under bfloat16 autocast
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.modules |= {"fla.layers": None, "fla.models": None}  # type: ignore[dict-item]  # not called, and most of a minute to import

from models.batch import Bounds  # noqa: E402
from models.memory import fla_followed, fla_kernels  # noqa: E402
from models.memory.protocol import LocalCarry, MemoryModule  # noqa: E402
from tests.models.memory.conformance_cases import B, make  # noqa: E402

D, T = 32, 70
DOCUMENTS = ((0, 1, 20, 64), (0, 33))
SETTINGS: dict[str, dict[str, Any]] = {
    "gated_deltanet": {},
    "mamba2": {"mamba2": {"state_dim": 16, "expand": 1.5}},
    "gsa": {"gsa": {"n_slots": 16, "chunk_size": 8}},
}
SCENARIOS = {"whole": False, "packed and split": True}


class OneOfMany(LocalCarry):
    """The path of a split sequence, on one rank."""

    local = False


class Turn(int):
    """A turn of a loop, which compiled code may widen and the interpreter counts in plain integers."""

    def to(self, dtype: Any) -> Turn:
        """Itself: Python's integers are wide."""
        return self


def _turns(*bounds: Any) -> Iterator[Turn]:
    return (Turn(i) for i in range(*(int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds)))


def fit_for_the_interpreter() -> None:
    """It cannot time configurations (the first one is taken), and loops over states count in integers that have no ``to``."""
    from triton.runtime import autotuner  # pyright: ignore[reportMissingImports]

    autotuner.Autotuner._bench = lambda self, *args, config, **rest: [0.0] * 3  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("chunk_delta_h", "chunk_h"):
        vars(importlib.import_module(f"fla.ops.common.{name}"))["range"] = _turns


def results(module: MemoryModule, forward: Any, x: torch.Tensor, state: torch.Tensor, bounds: Bounds) -> dict[str, torch.Tensor]:
    """Output, state and gradients, in float64."""
    x, state = x.clone().requires_grad_(), state.clone().requires_grad_()
    fresh = module.init_state(B, x.device, state.dtype)
    y, after = forward(x, {**fresh, "state": state}, bounds)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.device)
    loss = (y.float() * weight).sum() + after["state"].square().sum()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    found = {"output": y, "state": after["state"], "d input": x.grad, "d state": state.grad, **grads}
    module.zero_grad()
    return {name: value.detach().double().cpu() for name, value in found.items() if value is not None}


def compared(name: str, scenario: str, device: str) -> dict[str, float]:
    """Relative errors of one module in one scenario."""
    documents = DOCUMENTS if scenario.startswith("packed") else ((0,),) * B
    whole = Bounds(T, ((0, T),), documents)
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))
    module = make(name, d_model=D, kernel="fla", **SETTINGS[name])
    state = torch.randn(B, *module.state_shape, generator=torch.Generator().manual_seed(4)) * 0.3  # type: ignore[attr-defined]
    want = results(module, module.oracle, x.double(), state.double(), whole)
    module = module.to(device, torch.float32)
    bounds = whole
    if SCENARIOS[scenario]:
        module.carry, bounds = OneOfMany(), whole.with_ranges(((0, 33), (33, T)))
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        got = results(module, module, x.to(device), state.to(device), bounds)
    assert set(got) == set(want)
    return {key: float((got[key] - want[key]).norm() / want[key].norm().clamp_min(1e-9)) for key in want}


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still there: now, and at most. What triton's interpreter makes while it
    runs a kernel (``inside``) is not counted."""

    inside = False

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not Live.inside and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def memory_of(function: Any, shapes: list[tuple[int, ...]], states: list[tuple[int, ...]]) -> tuple[int, int, int]:
    """Of one call: bytes that it keeps for backward, and its largest workspaces forward and backward."""
    gates = len(shapes) - 1 if len(states) == 2 else 3  # from here on: decays, in float32
    inputs = [torch.zeros(shape, dtype=torch.float32 if i >= gates else torch.bfloat16).requires_grad_() for i, shape in enumerate(shapes)]
    initial = [torch.zeros(shape).requires_grad_() for shape in states]
    with Live() as live:
        o, after = function(*inputs, scale=1.0, initial_state=initial[0] if len(initial) == 1 else initial, output_final_state=True)
        kept, forward = live.now, live.most
    results = (o, *(after if isinstance(after, tuple | list) else [after]))
    grads = [torch.zeros_like(one) for one in results]
    with Live() as live:
        torch.autograd.backward(results, grads)
        backward = live.most
    return kept, forward, backward


def followed_memory() -> dict[str, dict[str, float]]:
    """By how much of the kernels' own memory the stand-ins of a plan are off."""
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    execute = interpreter.GridExecutor.__call__

    def executed(*args: Any, **kwargs: Any) -> Any:
        Live.inside = True
        try:
            return execute(*args, **kwargs)
        finally:
            gc.collect()  # its frames hold on to the tensors
            Live.inside = False

    interpreter.GridExecutor.__call__ = executed
    B, T, H, K, V, M = 1, 192, 2, 32, 48, 16
    token, gate = (B, T, H), [(B, T, H)]
    followed = {
        "gated_delta_rule": fla_followed.followed_delta_rule,
        "simple_gla": fla_followed.followed_simple_gla,
        "gsa": fla_followed.followed_gsa,
    }
    cases = {
        "gated_delta_rule": ([(*token, K), (*token, K), (*token, V), *gate * 2], [(B, H, K, V)]),
        "simple_gla": ([(*token, K), (*token, K), (*token, V), *gate], [(B, H, K, V)]),
        "gsa": ([(*token, K), (*token, K), (*token, V), (*token, M), (*token, M)], [(B, H, K, M), (B, H, M, V)]),
    }
    found = {}
    for name, (shapes, states) in cases.items():
        own = memory_of(getattr(fla_kernels.operators(), name), shapes, states)
        with FakeTensorMode():
            planned = memory_of(followed[name], shapes, states)
        print(name, own, planned, file=sys.stderr)
        found[f"memory of {name}"] = {
            what: planned_bytes / own_bytes - 1
            for what, own_bytes, planned_bytes in zip(("kept", "forward", "backward"), own, planned, strict=True)
        }
    return found


def main() -> int:
    device = sys.argv[1]
    if device == "cpu":
        fit_for_the_interpreter()
    names = sys.argv[2:] or [*SETTINGS, *(["memory"] if device == "cpu" else [])]
    found = {f"{name}, {scenario}": compared(name, scenario, device) for name in names if name != "memory" for scenario in SCENARIOS}
    print(json.dumps(found | (followed_memory() if "memory" in names else {})))
    return 0


sys.exit(main())
