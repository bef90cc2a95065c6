"""What becomes of the tensors that a block's mixer saves for backward: kept, parked in host memory, or made again.

The mixer runs under saved-tensor hooks, so this works for any ``inner_attention`` (one device, ring, halo) and any memory module.
Attention: q, k, v are made again from the block's input without running attention; its output and log-sum-exp are kept or parked by
token ranges, or attention runs forward again. Over several ranks every rank unpacks in the same order, so collectives match.

Legend: B row, H heads, T token, D head size, C channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from memory_mgmt.pieces import Held, Parked
from models.memory.protocol import MemoryModule
from models.repeat import again
from parallel.host_keys import detached, is_stand_in

if TYPE_CHECKING:
    from memory_mgmt.execution import Pass

_SMALL_BYTES = 4096
"""A memory's tensors below this size stay where they are."""


class Saving(Protocol):
    """One mixer's saved tensors in one pass."""

    def trim(self) -> None:
        """At the end of the block's forward: let go of what is not kept."""
        ...

    def mixed(self) -> Tensor | None:
        """In backward, before the mixer's own: its output, if anything will be computed from it."""
        ...


class AttentionSaving:
    """See the module. The graph holds this object through its hooks; it holds no tensor of the graph (they are detached)."""

    def __init__(self, one: Pass) -> None:
        self._pass = one
        self._mixer = one.run.block.mixer
        split = one.run.policy.mixer.tokens(one.n_tokens, one.run.tile_tokens)
        # Attention cannot be run for the last tokens only: then all of it runs again, and nothing need be held.
        self._again = split.recomputed > 0
        self._swapped, self._kept = split.swapped, split.kept
        self._saved: list[Tensor] = []
        self._names: list[str] = []
        self._held: dict[str, Held] = {}
        self._by_rank: set[str] = set()
        """Of what is held: with its tokens by the ranks that share them."""
        self._whole: dict[str, Tensor] = {}
        """Values that were tensors by ranges and are wanted soon."""
        self._in_host: dict[str, Tensor] = {}
        """Stand-ins of keys and values that attention itself keeps in host memory: no policy holds them."""

    def run(self, *entered: Tensor) -> Tensor:
        """Attention of q, k, v."""
        q_BHTD, k_BGTD, v_BGTD = entered
        if is_stand_in(k_BGTD):
            self._in_host = {"k": detached(k_BGTD), "v": v_BGTD.detach()}
        with saved_tensors_hooks(self._pack, self._unpack):
            out_BHTD = self._mixer.inner_attention(q_BHTD, k_BGTD, v_BGTD, self._pass.bounds)  # type: ignore[operator]
        self._settle({"q": q_BHTD, "k": k_BGTD, "v": v_BGTD, "out": out_BHTD})
        return out_BHTD

    def _pack(self, tensor: Tensor) -> int:
        self._saved.append(tensor.detach())
        return len(self._saved) - 1

    def _settle(self, known: dict[str, Tensor]) -> None:
        """Decide about every saved tensor, now that it is known which is which."""
        names = {_place(tensor): name for name, tensor in known.items()}
        self._names = [names.get(_place(tensor), f"saved {i}") for i, tensor in enumerate(self._saved)]
        self._uses = Counter(self._names)
        tensors = known | dict(zip(self._names, self._saved, strict=True))
        self._saved.clear()
        split = self._pass.split["projections"]
        for name in self._in_host:
            del tensors[name]
        for name in [name for name in ("q", "k", "v") if name not in self._in_host]:
            self._held[name] = self._hold(name, tensors.pop(name), split.swapped, split.kept)
            self._held[name].trim()
        if not self._again:
            for name, tensor in tensors.items():
                if tensor.ndim:
                    self._held[name] = self._hold(name, tensor, self._swapped, self._kept)
                else:
                    self._whole[name] = tensor.detach()

    def _hold(self, name: str, tensor: Tensor, swapped: int, kept: int) -> Held:
        if _by_tokens(self._pass, tensor):
            self._by_rank.add(name)
        return hold(self._pass, tensor, name, swapped, kept)

    def _joined(self, name: str, tensor: Tensor) -> Tensor:
        """The value of a held tensor as attention knows it."""
        return self._pass.parts.joined(tensor) if name in self._by_rank else tensor

    def trim(self) -> None:
        """See `Saving.trim`."""
        for held in self._held.values():
            held.trim()

    def mixed(self) -> Tensor:
        """See `Saving.mixed`."""
        return self._value("out", take=False)

    def _unpack(self, index: int) -> Tensor:
        return self._value(self._names[index], take=True)

    def _value(self, name: str, take: bool) -> Tensor:
        """A saved tensor whole; ``take``: for one of the places where the graph has it; after the last one it is let go."""
        if name not in self._whole:
            if self._again and (name == "out" or name.startswith("saved")):
                self._attend_again()
            elif name in ("q", "k", "v"):
                self._whole |= self._projections()
            else:
                self._whole[name] = self._joined(name, self._held.pop(name).whole())
        self._uses[name] -= take
        return self._whole[name] if self._uses[name] > 0 or not take else self._whole.pop(name)

    def _projections(self) -> dict[str, Tensor]:
        """q, k, v from what is held; the tokens that are not are projected again, all three at once."""
        n = self._pass.n_tokens
        held = {name: self._held.pop(name) for name in ("q", "k", "v") if name not in self._in_host}
        first = held["q"].missing_from
        if first == 0:
            made = zip(("q", "k", "v"), self._pass.entered(0, n), strict=True)
            return {name: self._joined(name, value) for name, value in made if name in held}
        whole = {name: one.whole() for name, one in held.items()}
        if first < n:
            for name, made in zip(("q", "k", "v"), self._pass.entered(first, n), strict=True):
                if name in whole:
                    whole[name].narrow(self._pass.parts.mixer_dim, first, n - first).copy_(made)
        return {name: self._joined(name, value) for name, value in whole.items()}

    def _attend_again(self) -> None:
        """Run attention forward once more, for everything that it saves."""
        names = ("q", "k", "v")
        qkv = [self._in_host[name] if name in self._in_host else self._value(name, take=False).detach() for name in names]
        made: list[Tensor] = []

        def pack(tensor: Tensor) -> None:
            made.append(tensor.detach())

        with again(), torch.enable_grad(), torch.autocast(**self._pass.autocast), saved_tensors_hooks(pack, _never):
            out_BHTD = self._mixer.inner_attention(*(x.requires_grad_() for x in qkv), self._pass.bounds)  # type: ignore[operator]
        self._whole |= dict(zip(self._names, made, strict=True)) | {"out": out_BHTD.detach()}


def _by_tokens(one: Pass, tensor: Tensor) -> bool:
    """Whether a tensor of attention has one value per token; the keys before a window have not, nor what is of other ranks' tokens."""
    return tensor.ndim >= 3 and tensor.shape[2] == one.n_tokens * one.parts.tokens.ranks


def hold(one: Pass, tensor: Tensor, name: str, swapped: int, kept: int) -> Held:
    """A tensor of attention by tokens (``by_rank``); one that has none whole, where the larger part of the tokens goes."""
    if not _by_tokens(one, tensor):
        n, swapped = len(tensor), len(tensor) if 2 * swapped > one.n_tokens else 0
        return Held(tensor, 0, swapped, n - swapped, one.parking, name)
    return Held(one.parts.by_rank(tensor), one.parts.mixer_dim, swapped, kept, one.parking, name)


def _never(packed: Any) -> Tensor:
    raise RuntimeError("attention that ran again only for what it saves was differentiated")


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of which memory a tensor is."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


class _Normed(NamedTuple):
    """A view of the normed input, which is made again."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Packed(NamedTuple):
    """A tensor in host memory, for as long as autograd holds this."""

    parked: Parked


class MemorySaving:
    """A memory layer: by tiles the first ones' tensors are parked, the next ones' kept, the last ones computed again.

    Its output is wanted again if the feed-forward is to be recomputed from it. Then it is held like its inside; or, with the whole
    inside recomputed, as the policy says for ``projections``, which a memory has none of: recomputing that too means that the whole
    memory runs again before the feed-forward's backward, once for both (`_Again`).
    """

    def __init__(self, one: Pass) -> None:
        mixer, split = one.run.block.mixer, one.run.policy.mixer
        assert isinstance(mixer, MemoryModule)
        self._pass, self._mixer = one, mixer
        n, tile = one.n_tokens, one.run.memory_tile_tokens
        if not tile and max(split.keep, split.swap, split.recompute) < 1:
            tile = -(-n // 8)
        self._tile_tokens = tile
        tokens, output = split.tokens(n, tile), one.split["projections"]
        self._swapped, self._recomputed_from = tokens.swapped, tokens.held
        self._output_wanted = one.split["feed_forward"].recomputed > 0
        recomputed = self._recomputed_from == 0
        # A run inside an autograd node has no graph for a state that is handed on: then tiles run again, and the output is kept.
        in_graph = one.run.keep_rng or mixer.carrier.handed is not None
        self._run_again = recomputed and self._output_wanted and output.recomputed > 0 and not in_graph
        self._output_swapped = output.swapped if recomputed else self._swapped
        self._park_now, self._count = False, 0
        self._output: Held | None = None
        self.again: tuple[Tensor, Tensor] | None = None
        """(h, y) of a second forward pass, with the graph between them."""

    def run(self, *entered: Tensor) -> Tensor:
        """The memory's output for its normed input."""
        (h_BTC,) = entered
        if self._run_again:
            return _Again.apply(self, h_BTC, *self.parameters())  # type: ignore[return-value]
        self._normed_storage = h_BTC.untyped_storage()._cdata
        self._parameters = {p.untyped_storage()._cdata for p in self._mixer.parameters()}
        self._park_now = self._swapped == self._pass.n_tokens
        with saved_tensors_hooks(self._pack, self._unpack):
            if self._recomputed_from == 0 and not self._tile_tokens:
                y_BTC = self._checkpoint(self.outputs, h_BTC)
            else:
                y_BTC = self.outputs(h_BTC)
        if self._output_wanted:
            n, parking = self._pass.n_tokens, self._pass.parking
            self._output = Held(y_BTC, 1, self._output_swapped, n - self._output_swapped, parking, "output")
        return y_BTC

    def parameters(self) -> list[Tensor]:
        """The memory's parameters as they are now."""
        return list(self._mixer.parameters())

    def outputs(self, h_BTC: Tensor) -> Tensor:
        """Run the memory, tile by tile."""
        mixer = self._mixer
        mixer.tile_tokens, mixer.run_tile = self._tile_tokens, self._run_tile
        try:
            return mixer.remember(h_BTC, self._pass.bounds)
        finally:
            mixer.run_tile = None

    def _checkpoint(self, body: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return body(*args)
        return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=self._pass.run.keep_rng)

    def _run_tile(self, first: int, n_tokens: int, body: Callable[..., Any], *args: Any) -> Any:
        """One tile, ``first`` token of this rank's onwards."""
        if not self._tile_tokens:
            return body(*args)
        if first + n_tokens > self._recomputed_from:
            return self._checkpoint(body, *args)
        outside, self._park_now = self._park_now, first < self._swapped
        try:
            return body(*args)
        finally:
            self._park_now = outside

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()._cdata
        if storage == self._normed_storage:
            return _Normed(tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        tensor = tensor.detach()  # with its node it would hold the graph that holds it
        small = tensor.numel() * tensor.element_size() < _SMALL_BYTES
        if not self._park_now or small or storage in self._parameters:
            return tensor
        self._count += 1
        return _Packed(self._pass.parking.park(tensor, ("inside", self._count)))

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Normed):
            return self._pass.normed().as_strided(*packed)
        return packed.parked.fetch() if isinstance(packed, _Packed) else packed

    def trim(self) -> None:
        """See `Saving.trim`."""
        if self._output is not None:
            self._output.trim()

    def mixed(self) -> Tensor | None:
        """See `Saving.mixed`; None if nothing will be computed from it."""
        if self._run_again:
            self.again = self._second_run()
            return self.again[1].detach()
        output, self._output = self._output, None
        return None if output is None else output.whole()

    def _second_run(self) -> tuple[Tensor, Tensor]:
        h_BTC = self._pass.normed().detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(**self._pass.autocast):
            return h_BTC, self.outputs(h_BTC)


class _Again(torch.autograd.Function):
    """A memory that keeps nothing; ``MemorySaving.mixed`` has run it again by the time its backward comes."""

    @staticmethod
    def forward(ctx: Any, saving: MemorySaving, h_BTC: Tensor, *parameters: Tensor) -> Tensor:
        ctx.saving = saving
        return saving.outputs(h_BTC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saving: MemorySaving = ctx.saving
        assert saving.again is not None
        (h_BTC, y_BTC), saving.again = saving.again, None
        needed = ctx.needs_input_grad[2:]
        wanted = [p for p, need in zip(saving.parameters(), needed, strict=True) if need]
        dh_BTC, *found = torch.autograd.grad(y_BTC, [h_BTC, *wanted], grads[0], allow_unused=True)
        rest = iter(found)
        return None, dh_BTC, *(next(rest) if need else None for need in needed)
