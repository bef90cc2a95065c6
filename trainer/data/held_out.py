"""Which documents of a token store are held out for validation: a pure function of each document, not of their order."""

from __future__ import annotations

import numpy as np

from models.errors import UserError


def split_documents(documents: np.ndarray, fraction: float, key: str = "data.path") -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) document numbers of DOCUMENT records.

    Held out is a document whose key, as a fraction of 2**64, lies below ``fraction``; with a fraction above 0 at least the one with
    the lowest key. Equal documents have equal keys and so never stand on both sides; adding documents moves none to the
    other side. Raises UserError when nothing would be left on a side that must not be empty.
    """
    everything = np.arange(len(documents))
    if fraction == 0:
        return everything, everything[:0]
    candidates = documents[~documents["train_only"]]
    if len(candidates) == 0:
        raise UserError(f"{key} has no document that can be held out; set data.valid_path, or data.valid_fraction=0")
    limit = max(int(fraction * 2.0**64), int(candidates["key"].min()) + 1)
    held_out = ~documents["train_only"] & (documents["key"] <= np.uint64(limit - 1))
    if held_out.all():
        n, plural = len(documents), "s" if len(documents) > 1 else ""
        raise UserError(
            f"{key} has {n} distinct document{plural}, all of which data.valid_fraction={fraction} holds out; "
            "set data.valid_path, or data.valid_fraction=0"
        )
    return everything[~held_out], everything[held_out]


def without_copies(documents: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers of the documents that do not also stand in ``held_out`` (another store's records), and how many do."""
    copies = np.isin(documents["key"], held_out["key"])
    return np.flatnonzero(~copies), int(copies.sum())
