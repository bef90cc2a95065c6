"""What is in a checkpoint: tensors by name for torch's distributed checkpoint, everything else as JSON, random states.

Nothing is pickled. A ``Stateful`` gives a nested dict; its tensors (DTensor: each rank its shard; plain tensors: the same
on every rank) are stored under dotted names, its other leaves in ``train_state.json``.

Random states are stored per rank and restored only on the same number of ranks. On another number they start from the
seed again: nothing in training draws random numbers after the weights are initialised (data order is a pure function of
seed and step, there is no dropout).
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from trainer.tensor_pieces import is_shared

STATE_NAME = "train_state.json"


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be saved: names to tensors or JSON values, nested by dicts."""

    def state_dict(self) -> dict[str, Any]:
        """Current values; tensors may alias the live ones."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take over values in the form that ``state_dict`` gives."""
        ...


def rank_state_name(rank: int) -> str:
    """File of one rank's random states."""
    return f"rank_{rank:05d}.json"


def state_dicts(state: Mapping[str, Stateful | dict[str, Any]]) -> dict[str, Any]:
    """Nested dicts by entry name; an entry may be a Stateful or already a dict."""
    return {name: entry if isinstance(entry, dict) else entry.state_dict() for name, entry in state.items()}


def split_leaves(nested: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split nested dicts into ``{dotted name: tensor}`` and the nested rest of JSON values.

    Raises ValueError naming the entry for a key that is not text, two entries of one dotted name, or a value that is
    neither a tensor nor JSON.
    """
    tensors: dict[str, torch.Tensor] = {}

    def rest_of(value: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
        rest: dict[str, Any] = {}
        for key, child in value.items():
            name = f"{prefix}{key}"
            if not isinstance(key, str):
                raise ValueError(
                    f"state entry '{name}' has a key of type {type(key).__name__}: use names (fully qualified parameter names)"
                )
            if isinstance(child, torch.Tensor):
                if name in tensors:
                    raise ValueError(f"two state entries have the name '{name}'")
                tensors[name] = child
            elif isinstance(child, Mapping):
                rest[key] = rest_of(child, f"{name}.")
            else:
                rest[key] = _json_value(child, name)
        return rest

    return tensors, rest_of(nested, "")


def split_state(state: Mapping[str, Stateful | dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """``split_leaves`` of all entries; raises ValueError also for an entry with a dot in its name."""
    if any("." in entry for entry in state):
        raise ValueError(f"names of checkpoint entries hold no '.': {sorted(state)}")
    return split_leaves(state_dicts(state))


def json_bytes(value: Any) -> bytes:
    """A JSON file, the same for the same values."""
    return (json.dumps(value, sort_keys=True) + "\n").encode()


def _json_value(value: Any, name: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise ValueError(f"state entry '{name}' ({type(value).__name__}) is neither a tensor nor a JSON value") from None


def put_back(nested: Mapping[str, Any], saved: Any, prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Join loaded tensors (the leaves of ``nested``) with the saved JSON values.

    A part that holds no tensor takes the saved values whole. Elsewhere a value that only one side has keeps its current
    value (or is dropped) and is named in the returned notes: newer torch versions add optimizer settings.
    """
    saved = saved if isinstance(saved, Mapping) else {}
    joined: dict[str, Any] = {}
    notes = [f"'{prefix}{key}' of the checkpoint is not used" for key in saved if key not in nested]
    for key, value in nested.items():
        if isinstance(value, torch.Tensor):
            joined[key] = value
        elif _holds_tensor(value):
            joined[key], more = put_back(value, saved.get(key), f"{prefix}{key}.")
            notes += more
        elif key in saved:
            joined[key] = saved[key]
        else:
            joined[key] = value
            notes.append(f"'{prefix}{key}' is not in the checkpoint and keeps its value")
    return joined, notes


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, Mapping) and any(_holds_tensor(child) for child in value.values()))


def plain_digests(tensors: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor] | None = None) -> dict[str, str]:
    """Digest of each tensor that ranks do not share: only one rank's copy is stored, so all must be the same.

    ``copies`` hold the values if given.
    """
    digests = {}
    for name, tensor in tensors.items():
        if not is_shared(tensor):
            values = tensor if copies is None else copies[name]
            content = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[name] = hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode() + content.tobytes()).hexdigest()
    return digests


def random_state() -> dict[str, Any]:
    """States of all random generators of this process as JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
    }


def restore_random_state(saved: Mapping[str, Any]) -> None:
    """Put back what ``random_state`` gave; CUDA only where there is a device and a saved state."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(saved["torch"]))
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(saved["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
