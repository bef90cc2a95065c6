"""The terms of an estimated plan: what each is called, its kind, and how it is computed in words. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from memory_mgmt.plan import Kind

Live = dict[str, int]
"""Bytes by term."""


@dataclass(frozen=True)
class Label:
    """Of one term. ``{w}`` in the formula: bytes of a parameter."""

    kind: Kind
    formula: str


LABELS: dict[str, Label] = {
    "parameters": Label("parameters", "this rank's shard, {w} bytes each"),
    "parameters gathered (one block)": Label("parameters", "one block whole for computing, in backward the next one's buffer as well"),
    "parameters gathered (embedding, head)": Label("parameters", "a tied embedding stays whole through the step, a head through the loss"),
    "gradients": Label("gradients", "one per parameter of the shard, {w} bytes each"),
    "gradients before reduction": Label("gradients", "one block's and the head's gradients whole, and the reduction's copy"),
    "AdamW moments": Label("optimizer", "two per parameter of the shard, {w} bytes each"),
    "optimizer states": Label("optimizer", "counted parameter by parameter: longstride plan --optimizer shows them"),
    "block inputs": Label("activations", "residual stream and norm statistics of every block"),
    "attention": Label("activations", "per attention layer: input, q, k, v, out, log-sum-exp"),
    "memory layers": Label("activations", "per memory layer: projections, chunk matrices, states (with tiles: one state per tile)"),
    "feed-forward": Label("activations", "per layer: input, gate, up and product (with tiles: the input)"),
    "rotary table": Label("activations", "cos and sin of every token, shared by all layers"),
    "one block recomputed": Label("transient", "what recomputation brings back: everything inside one block"),
    "inside a forward pass": Label("transient", "made and freed while one block runs forward"),
    "inside a backward pass": Label("transient", "made and freed while one part of a block runs backward"),
    "gradient of the residual stream": Label("transient", "one copy of the residual stream"),
    "optimizer step": Label("transient", "temporaries of AdamW"),
    "updates of matrices": Label("transient", "float32 updates of matrices that are taken at a time, and what they are made of"),
    "buckets of moments": Label("transient", "two buckets of the moments that wait in host memory, while they are updated"),
    "loss inputs": Label("loss", "last residual stream, log-sum-exp and loss per token"),
    "logits of one tile": Label("loss", "loss_tile_tokens x vocabulary, one or two copies"),
    "loss gradients": Label("loss", "gradients of the last residual stream and of the output matrix"),
    "gradients of value tables": Label("gradients", "of rows that were read, at most every entry another one; {w} bytes each"),
    "exchange between ranks": Label("communication", "buffers of one layer: of the sequence scheme, a halo or states"),
    "batch": Label("batch", "tokens, labels and positions of the step, prefetched ones as well"),
    "libraries": Label("overhead", "measured, not derived: code and scratch of kernels loaded in the first step"),
    "heap": Label("overhead", "measured, not derived: holes that tensors of small tiles leave"),
    "heap holes": Label("overhead", "measured, not derived: freed blocks that the C library keeps; given back where memory is tight"),
    "cuBLAS workspace": Label("overhead", "32 MiB per handle"),
    "process": Label("outside", "interpreter, torch and the trainer before anything is built"),
    "CUDA context": Label("outside", "context and library handles"),
    "NCCL buffers": Label("outside", "channels of the process groups"),
}


def add(left: Live, right: Live) -> Live:
    """Both together."""
    return left | {name: left.get(name, 0) + size for name, size in right.items()}


def summed(*parts: Live) -> Live:
    """All of them together."""
    total: Live = {}
    for part in parts:
        total = add(total, part)
    return total
