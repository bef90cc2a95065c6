"""Keys that other trainers have and that this one does not follow, with the reason a person wants to read. Imports no torch."""

from __future__ import annotations

_NO_DROPOUT = (
    "attention has no dropout: fused kernels draw their masks per call, so that another number of ranks, sequence scheme or chunk would "
    "train another model, and the CPU's takes none; regularise with optim.weight_decay"
)
DECLINED = {
    **dict.fromkeys(("model.attention_dropout", "model.attn_dropout", "model.attn_pdrop", "model.dropout"), _NO_DROPOUT),
}
"""Keys that other trainers have and that mean something here that is not done, with the reason."""
