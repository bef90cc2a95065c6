"""What storing Adam's moments in few bits costs in time and in accuracy, on this machine's CPU.

Time: one AdamW step of a model (decode both moments, update, encode both), CPU seconds of one thread, least of rounds in which all
systems take turns in one process. Models: the small byte-level LLaMA of 856,064 parameters in 30 matrices, and one matrix of 1024 x 1024.
Codecs are driven here by a plain loop, tensor by tensor, and with matrices of equal row length stacked: rows know nothing of each other,
so their parts can lie in one buffer. Peers: torch's fused AdamW (float32 states) and, where it can be imported, bitsandbytes' AdamW8bit.

Accuracy: a small language model is trained on the source text of Python's own library; the gradients of four matrices in 200 steps are
replayed through Adam, with moments stored by each codec between steps, and the updates compared with Adam in float32: norm of the
difference over norm of the update, mean over steps 20 to 200. Also each moment alone with the codes that were tried and not chosen.

  python benchmarks/optimizer_codecs.py            # about 5 minutes; writes optimizer_codecs.json and optimizer_codecs.md beside it
  python benchmarks/optimizer_codecs.py --quick    # 40 steps, fewer rounds, prints only

bitsandbytes 0.50.2 was installed beside, not into, this project's environment:
  pip install --no-deps --target peers bitsandbytes==0.50.2 && PYTHONPATH=peers python benchmarks/optimizer_codecs.py
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not as a module

from optim.codecs import Codec, codec_for, codec_named  # noqa: E402
from optim.pieces import piece_elements, row_chunks  # noqa: E402

D_MODEL, D_FF, LAYERS, BYTES = 128, 344, 4, 256
LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.95, 1e-8, 0.1
BLOCK_MATRICES = [(D_MODEL, D_MODEL)] * 4 + [(D_FF, D_MODEL)] * 2 + [(D_MODEL, D_FF)]
MODELS = {
    "small LLaMA, 856,064 parameters in 30 matrices": BLOCK_MATRICES * LAYERS + [(BYTES, D_MODEL)] * 2,
    "one matrix of 1024 x 1024": [(1024, 1024)],
}
STORED = ("bf16", "int8", "int8_dynamic", "int4")
GOALS = {"int8 over bitsandbytes": 0.3, "milliseconds of int8, 1024 x 1024": 6.0}
RECORDED = ("embed.weight", "head.weight", "blocks.0.qkv.weight", "blocks.1.down.weight")


class CodedAdamW:
    """AdamW whose moments are stored by a codec; ``stack``: matrices of equal row length share their parts."""

    def __init__(self, parameters: list[Tensor], name: str, stack: bool) -> None:
        self.step_number = 0
        groups: dict[int, list[Tensor]] = {}
        for index, parameter in enumerate(parameters):
            groups.setdefault(parameter.shape[1] if stack else -index, []).append(parameter)
        self.groups = [(members, *self._states(members, name)) for members in groups.values()]

    @staticmethod
    def _states(members: list[Tensor], name: str) -> list[tuple[Codec, dict[str, Tensor]]]:
        shape = (sum(len(member) for member in members), members[0].shape[1])
        codecs = [codec_for(name, shape, signed) for signed in (True, False)]
        return [(codec, {part: torch.zeros(s, dtype=d) for part, (s, d) in codec.parts(shape).items()}) for codec in codecs]

    def state_bytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for _, *states in self.groups for _, parts in states for part in parts.values())

    @torch.no_grad()
    def step(self) -> None:
        """As torch.optim.AdamW."""
        self.step_number += 1
        for members, m_state, v_state in self.groups:
            if len(members) == 1:
                self._update(members[0], members[0].grad, m_state, v_state)
                continue
            gradient = torch.cat([member.grad for member in members if member.grad is not None])
            weight = torch.cat(members)
            self._update(weight, gradient, m_state, v_state)
            for member, rows in zip(members, weight.split([len(member) for member in members]), strict=True):
                member.copy_(rows)

    def _update(self, weight: Tensor, gradient: Tensor | None, m_state: Any, v_state: Any) -> None:
        assert gradient is not None
        (m_codec, m_parts), (v_codec, v_parts) = m_state, v_state
        size1, size2 = LR / (1 - BETA1**self.step_number), (1 - BETA2**self.step_number) ** 0.5
        elements = piece_elements(weight.device)
        scratch = [torch.empty(min(elements, weight.numel())) for _ in range(2)]
        for rows in row_chunks(weight.shape[0], weight.shape[1], elements, weight):
            w, g = weight[rows], gradient[rows]
            m, v = (work[: w.numel()].view(w.shape) for work in scratch)
            here_m, here_v = ({name: part[rows] for name, part in parts.items()} for parts in (m_parts, v_parts))
            m_codec.decode(here_m, tuple(w.shape), m).lerp_(g, 1 - BETA1)
            v_codec.decode(here_v, tuple(w.shape), v).mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            m_codec.encode_(m, here_m)
            v_codec.encode_(v, here_v)
            w.mul_(1 - LR * DECAY).addcdiv_(m, v.sqrt_().add_(EPS * size2), value=-size1 * size2)


def peers() -> dict[str, Any]:
    """bitsandbytes or why it is not measured."""
    try:
        return {"bitsandbytes": importlib.import_module("bitsandbytes")}
    except Exception as error:  # whatever a foreign package raises is reported, not hidden
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def time_model(shapes: list[tuple[int, int]], rounds: int, bitsandbytes: Any) -> list[dict[str, Any]]:
    """CPU milliseconds of a step of each system, all in turns."""
    generator = torch.Generator().manual_seed(0)

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        for parameter in made:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
        return made

    settings: dict[str, Any] = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
    systems: dict[str, Any] = {"torch AdamW, fused, fp32 states": torch.optim.AdamW(parameters(), fused=True, **settings)}
    if bitsandbytes is not None:
        systems["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit(parameters(), **settings)
    for name in STORED:
        systems[name] = CodedAdamW([*parameters()], name, stack=False)
        if len(shapes) > 1:
            systems[f"{name}, stacked"] = CodedAdamW([*parameters()], name, stack=True)
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, optimizer in systems.items():
            started = time.process_time()
            optimizer.step()
            times[name].append((time.process_time() - started) * 1e3)
    elements = sum(rows * columns for rows, columns in shapes)
    return [
        {
            "system": name,
            "milliseconds": min(taken[1:]),
            "first_step_milliseconds": taken[0],
            "bytes_per_element": stored_bytes(systems[name]) / elements,
        }
        for name, taken in times.items()
    ]


def stored_bytes(optimizer: Any) -> int:
    """Of the moments, by storage."""
    if isinstance(optimizer, CodedAdamW):
        return optimizer.state_bytes()
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor) and value.dim()]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


class Block(nn.Module):
    """Attention and a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D_MODEL), nn.RMSNorm(D_MODEL)
        self.qkv, self.o = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False), nn.Linear(D_MODEL, D_MODEL, bias=False)
        self.gate, self.up = nn.Linear(D_MODEL, D_FF, bias=False), nn.Linear(D_MODEL, D_FF, bias=False)
        self.down = nn.Linear(D_FF, D_MODEL, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x_BTC)).chunk(3, -1))
        x_BTC = x_BTC + self.o(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        h_BTC = self.norm2(x_BTC)
        return x_BTC + self.down(F.silu(self.gate(h_BTC)) * self.up(h_BTC))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(BYTES, D_MODEL), nn.Parameter(torch.randn(128, D_MODEL) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(D_MODEL), nn.Linear(D_MODEL, BYTES, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embed(tokens_BT) + self.places
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


def recorded_gradients(steps: int) -> dict[str, Tensor]:
    """Of ``RECORDED``, [steps, rows, columns]."""
    torch.manual_seed(0)
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in library)), dtype=torch.uint8)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(BETA1, BETA2), fused=True)
    weights, found = dict(model.named_parameters()), {name: [] for name in RECORDED}
    for _ in range(steps):
        rows = torch.stack([text[at : at + 129] for at in torch.randint(len(text) - 129, (8,))]).long()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name in RECORDED:
            gradient = weights[name].grad
            assert gradient is not None
            found[name].append(gradient.clone())
        optimizer.step()
        optimizer.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in found.items()}


Store = Callable[[Tensor], Tensor]
"""What comes back of a matrix."""


def through(codec: Codec) -> Store:
    """A codec's round trip."""

    def store(value: Tensor) -> Tensor:
        parts = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in codec.parts(tuple(value.shape)).items()}
        codec.encode_(value, parts)
        return codec.decode(parts, tuple(value.shape))

    return store


def in_blocks(back: Store, block: int = 128) -> Store:
    """``back`` of each block scaled to a largest magnitude of 1."""

    def store(value: Tensor) -> Tensor:
        columns = value.shape[1]
        blocks = F.pad(value, (0, -columns % block)).unflatten(1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True)
        return (back(blocks / scale.clamp_min(1e-38)) * scale).flatten(1)[:, :columns]

    return store


def signed_power(power: float, steps: int) -> Store:
    return lambda x: x.sign() * ((x.abs() ** (1 / power) * steps).round() / steps) ** power


def softsign(x: Tensor) -> Tensor:
    root = (2 * x / (1 + x.abs()) * 127).round() / 127
    return root / (2 - root.abs())


def unsigned_power(power: float, steps: int) -> Store:
    return lambda x: ((x ** (1 / power) * steps).round().clamp_min(1) / steps) ** power


def logarithm(x: Tensor) -> Tensor:
    return torch.exp2(((x.clamp_min(1e-38).log2() / 20 + 1) * 254).round().clamp(0, 254) / 254 * 20 - 20)


def tried() -> dict[str, tuple[Store, Store]]:
    """Name -> what is done to the first and to the second moment between steps."""
    same: Store = lambda value: value  # noqa: E731
    both = {f"{name}, both moments": (through(codec_named(name)), through(codec_named(name, signed=False))) for name in STORED}
    first = {
        "int8 (chosen: power 2)": through(codec_named("int8")),
        "int8_dynamic": through(codec_named("int8_dynamic")),
        "softsign, 127 steps": in_blocks(softsign),
        "power 3, 127 steps": in_blocks(signed_power(3, 127)),
        "int4 (chosen: power 2, nearest number)": through(codec_named("int4")),
        "power 2, 7 steps, nearest root": in_blocks(signed_power(2, 7)),
    }
    second = {
        "int8 (chosen: power 4, by chance)": through(codec_named("int8", signed=False)),
        "int8_dynamic": through(codec_named("int8_dynamic", signed=False)),
        "power 2, 255 steps, nearest": in_blocks(unsigned_power(2, 255)),
        "power 4, 255 steps, nearest": in_blocks(unsigned_power(4, 255)),
        "power 8, 255 steps, nearest": in_blocks(unsigned_power(8, 255)),
        "logarithm over 2^20, 255 steps, nearest": in_blocks(logarithm),
        "int4 (chosen: power 2, by chance)": through(codec_named("int4", signed=False)),
        "power 1, 16 steps, nearest": in_blocks(unsigned_power(1, 16)),
        "power 2, 16 steps, nearest": in_blocks(unsigned_power(2, 16)),
    }
    alone = {f"m only: {name}": (store, same) for name, store in first.items()}
    return both | alone | {f"v only: {name}": (same, store) for name, store in second.items()}


def update_errors(gradients: Tensor, store_m: Store, store_v: Store, beta2: float) -> tuple[float, float]:
    """Mean over steps from 20 of the relative error of the update, and of its size over the exact update's."""
    exact_m = exact_v = m = v = torch.zeros_like(gradients[0])
    errors, sizes = [], []
    for step, gradient in enumerate(gradients, start=1):
        bias1, bias2 = 1 - BETA1**step, 1 - beta2**step
        exact_m, exact_v = (exact_m.lerp(gradient, 1 - BETA1), exact_v.lerp(gradient.square(), 1 - beta2))
        m, v = m.lerp(gradient, 1 - BETA1), v.lerp(gradient.square(), 1 - beta2)
        exact, update = exact_m / bias1 / ((exact_v / bias2).sqrt() + EPS), m / bias1 / ((v / bias2).sqrt() + EPS)
        m, v = store_m(m), store_v(v)
        if step > 20:
            errors.append(float((update - exact).norm() / exact.norm()))
            sizes.append(float(update.norm() / exact.norm()))
    return sum(errors) / len(errors), sum(sizes) / len(sizes)


def machine(bitsandbytes: Any) -> dict[str, Any]:
    """Where and with what this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitsandbytes": getattr(bitsandbytes, "__version__", None),
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    where = report["machine"]
    peer = f"bitsandbytes {where['bitsandbytes']}" if where["bitsandbytes"] else f"bitsandbytes not measured ({report['peer_error']})"
    lines = [
        "# Adam's moments in few bits: time and accuracy",
        "",
        f"{where['cpu']}, {where['cores']} cores, one thread; torch {where['torch']}, {peer}, Python {where['python']}; load average "
        f"{where['load_average_at_start']} before. Made by `python benchmarks/optimizer_codecs.py`; its first lines say what is measured.",
    ]
    for model, rows in report["times"].items():
        lines += [
            "",
            f"AdamW step of {model}:",
            "",
            "| moments | CPU ms | over fused fp32 | over bitsandbytes | first step, CPU ms | bytes per element |",
        ]
        lines.append("|---|---:|---:|---:|---:|---:|")
        by_name = {row["system"]: row["milliseconds"] for row in rows}
        other = by_name.get("bitsandbytes AdamW8bit")
        for row in rows:
            ratio = f"{row['milliseconds'] / other:.2f}x" if other else ""
            lines.append(
                f"| {row['system']} | {row['milliseconds']:.2f} | {row['milliseconds'] / next(iter(by_name.values())):.1f}x | {ratio} "
                f"| {row['first_step_milliseconds']:.1f} | {row['bytes_per_element']:.3f} |"
            )
    for beta2, table in report["errors"].items():
        lines += ["", f"Relative error of the update, beta2 {beta2} (in brackets its size over the exact one's):", ""]
        lines += ["| stored | " + " | ".join(RECORDED) + " |", "|---|" + "---:|" * len(RECORDED)]
        lines += [f"| {name} | " + " | ".join(f"{error:.4f} ({size:.3f})" for error, size in row) + " |" for name, row in table.items()]
    return "\n".join(lines) + "\n"


def goals_met(report: dict[str, Any]) -> bool:
    """Whether the int8 codec's times are within ``GOALS``; without a peer only the absolute one."""
    small, one = ({row["system"]: row["milliseconds"] for row in rows} for rows in report["times"].values())
    other = small.get("bitsandbytes AdamW8bit")
    quick = other is None or small["int8, stacked"] <= GOALS["int8 over bitsandbytes"] * other
    return quick and one["int8"] <= GOALS["milliseconds of int8, 1024 x 1024"]


def main() -> int:
    """Measure, print, write; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 steps, fewer rounds, prints only")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)  # threads that wait for one another on a busy machine would be timed too
    found = peers()
    bitsandbytes = found.get("bitsandbytes")
    report: dict[str, Any] = {"machine": machine(bitsandbytes), "peer_error": found.get("error")}
    report["times"] = {model: time_model(shapes, 8 if quick else 40, bitsandbytes) for model, shapes in MODELS.items()}
    gradients = recorded_gradients(40 if quick else 200)
    report["errors"] = {
        str(beta2): {name: [update_errors(gradients[matrix], m, v, beta2) for matrix in RECORDED] for name, (m, v) in tried().items()}
        for beta2 in (0.95, 0.999)
    }
    print(text := markdown(report))
    if not quick:
        Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        Path(__file__).with_suffix(".md").write_text(text)
    return 0 if goals_met(report) else 1


if __name__ == "__main__":
    sys.exit(main())
