"""What would lower the planned peak: settings, the peak each would give, and what it costs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from memory_mgmt.config import MemoryConfig
from memory_mgmt.plan import Change
from models.config import ModelConfig
from models.flops import ffn_parameters, memory_matmul_parameters, memory_other_parameters, model_flops_per_token
from parallel.config import ParallelConfig

WORTH_NAMING = 0.99
"""A change is named when it leaves less than this share of the peak."""


def changes(
    model: ModelConfig,
    parallel: ParallelConfig,
    memory: MemoryConfig,
    *,
    seq_len: int,
    vocab_size: int,
    zigzag: bool,
    cuda: bool,
    peak_bytes: int,
    peak_with: Callable[[MemoryConfig, ParallelConfig], int],
) -> list[Change]:
    """Settings that lower ``peak_bytes`` by at least one percent, cheapest first; after them all of them together, and more ranks.

    ``peak_with(memory, parallel)`` is the planned peak in bytes under other settings.
    """
    options = memory_options(model, memory, seq_len=seq_len, cp=parallel.cp, vocab_size=vocab_size, cuda=cuda)
    together = {key: value for settings, _ in options for key, value in settings.items()}
    if len(together) > 1:
        options.append((together, "the costs of each added"))
    found = []
    for settings, cost in options:
        overrides = " ".join(f"memory.{key}={value}" for key, value in settings.items())
        found.append(Change(overrides, peak_with(memory.model_copy(update=settings), parallel), cost))
    wider = parallel.model_copy(update={"cp": 2 * parallel.cp})
    enough = parallel.sequence != "ulysses" or wider.cp <= model.n_heads
    if enough and seq_len % (wider.cp * (2 if zigzag or "full" in model.layer_kinds else 1)) == 0:
        found.append(Change(f"parallel.cp={wider.cp}", peak_with(memory, wider), "twice the ranks"))
    return [change for change in found if change.peak_bytes < WORTH_NAMING * peak_bytes]


def memory_options(
    model: ModelConfig, memory: MemoryConfig, *, seq_len: int, cp: int, vocab_size: int, cuda: bool
) -> list[tuple[dict[str, int | str], str]]:
    """Single changes under ``memory`` and their cost in words. ``cuda``: the device has memory of its own."""
    local_tokens, flops_per_token = seq_len // cp, model_flops_per_token(model, vocab_size, seq_len)
    options: list[tuple[dict[str, int | str], str]] = []
    for tile in (1024, 256):
        if tile < min(memory.loss_tile_tokens, local_tokens):
            options.append(({"loss_tile_tokens": tile}, "same arithmetic in smaller pieces"))
    tile = max(256, min(2048, local_tokens // 16))
    if not memory.ffn_tile_tokens and tile < local_tokens:
        share = 2 * ffn_parameters(model) * len(model.layer_kinds) / flops_per_token
        in_eight_bits = memory.quantise != "none"  # then tiles are not computed again
        options.append(({"ffn_tile_tokens": tile}, "the same work in tiles" if in_eight_bits else f"about {share:.0%} more compute"))
    if not memory.memory_tile_tokens and tile < local_tokens and "memory" in model.layer_kinds:
        per_layer = memory_matmul_parameters(model) + memory_other_parameters(model)
        share = 2 * per_layer * model.layer_kinds.count("memory") / flops_per_token
        options.append(({"memory_tile_tokens": tile}, f"about {share:.0%} more compute"))
    if memory.recompute != "block":
        head_share = 2 * vocab_size * model.d_model / flops_per_token  # the head is not inside a block
        instead: dict[str, int | str] = {"recompute": "block"}
        if memory.quantise != "none":  # nothing is left to keep in eight bits then
            instead["quantise"] = "none"
        options.append((instead, f"about {1 / 3 - head_share:.0%} more compute"))
    return options + offload_options(memory, cuda=cuda)


def offload_options(memory: MemoryConfig, *, cuda: bool) -> list[tuple[dict[str, int | str], str]]:
    """The optimizer's states in host memory, where that is other memory than the device's and they are not there yet."""
    if not cuda or memory.offload_optimizer != "none":
        return []
    return [({"offload_optimizer": "host"}, "its states copied to the device and back in every update")]


def parameter_options(memory: MemoryConfig, *, cuda: bool) -> list[tuple[dict[str, int | str], str]]:
    """The parameters in host memory as well, as above. Only a traced step knows what that leaves."""
    if not cuda or memory.offload_parameters != "none":
        return []
    return [({"offload_optimizer": "host", "offload_parameters": "host"}, "both copied to the device, parameters for every pass")]
