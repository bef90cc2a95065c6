"""From the gates of tokens to what the scan of a Titans memory needs: the weight of every token's gradient, and a chunk's whole effect.

Legend: N chunks, G memories (stream x head), S streams, p tokens of this rank, Z 2 with momentum else 1.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import TitansConfig
from models.memory.chunk_plan import Share
from models.memory.fast_weights import Maps, compose, maps_after
from models.memory.protocol import Carry
from models.recomputed import recomputed


def write_weights(
    settings: TitansConfig, largest_rate: float, gates: dict[str, Tensor], share: Share, carry: Carry
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights [N, Z, G, p] of each token's gradient in its chunk's sums, maps (beta, f, m) [N, 3, G, 1] of the chunks, and Huber's delta.

    ``gates``: raw, by name, [N, G, p] each. What later ranks do to a chunk comes in as their maps, of one token's size.
    """
    names = [name for name in gates if name != "delta"]
    raw = [gates[name] for name in names]
    tokens = partial(_token_maps, settings, largest_rate, names, share)

    def pieces(*rates: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack(maps_after(*tokens(*rates)[0])[1]),)

    def weights(after_3NG1: Tensor, *rates: Tensor) -> tuple[Tensor, ...]:
        maps, theta = tokens(*rates)
        beta, f, m = compose(tuple(after_3NG1.unbind(0)), maps_after(*maps)[0])  # type: ignore[arg-type]
        return (torch.stack([theta * (beta + f), theta * m] if settings.has_momentum else [theta * beta], 1),)

    (own_3NG1,) = recomputed(pieces, *raw)
    of_ranks = carry.stacked(own_3NG1)
    one = torch.ones_like(own_3NG1[0])
    whole: Maps = (one, torch.zeros_like(one), one)
    after = whole
    for rank in range(len(of_ranks) - 1, -1, -1):
        after = whole if rank == share.rank else after
        whole = compose(whole, tuple(of_ranks[rank].unbind(0)))  # type: ignore[arg-type]
    (write,) = recomputed(weights, torch.stack(after), *raw)
    delta = F.softplus(gates["delta"]) if "delta" in gates else None
    return write, torch.stack(whole, 1), delta


def _token_maps(settings: TitansConfig, largest_rate: float, names: list[str], share: Share, *rates: Tensor) -> tuple[Maps, Tensor]:
    """Maps of single tokens and their learning rates, [N, G, p]; empty slots change nothing."""
    heads = rates[0].shape[1] // share.mask_NSp.shape[1]
    mask, first = (x.repeat_interleave(heads, dim=1) for x in (share.mask_NSp, share.first_NSp))
    gate = dict(zip(names, (rate.sigmoid() for rate in rates), strict=True))
    theta = gate["theta"].masked_fill(~mask, 0) * largest_rate
    nothing, one = torch.zeros_like(theta), torch.ones_like(theta)
    keep = torch.where(mask, 1 - gate["alpha"], one) if "alpha" in gate else one
    if "eta" not in gate:
        return (keep, nothing, nothing), theta
    moving = first if settings.variant == "lact" else mask
    if settings.variant == "titans":  # what a write comes to in the end is theta, whatever the momentum
        theta = theta * (1 - gate["eta"])
    return (keep, torch.where(moving, gate["eta"], nothing), torch.where(moving, gate["eta"], one)), theta
