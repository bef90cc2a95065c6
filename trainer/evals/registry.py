"""Every task by name. Imports no torch.

Try alone: ``python -c "from trainer.config import DataSection as D; from trainer.evals.registry import task_of; from trainer.evals.draws
import Draws; print(task_of(D(source='synthetic/mqar')).sample(Draws(0), 40))"``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import UserError
from trainer.data.tokenizers import Tokenizer, load_tokenizer
from trainer.evals.sample import Task
from trainer.evals.settings import DEFAULTS, OF_IDS, SyntheticSection

if TYPE_CHECKING:
    from trainer.config import DataSection

PREFIX = "synthetic/"
"""Of ``data.source`` for generated data."""

_CLASSES = {
    "mqar": "trainer.evals.tasks.mqar:Mqar",
    "associative": "trainer.evals.tasks.associative:Associative",
    **dict.fromkeys(("copy", "reverse", "sort"), "trainer.evals.tasks.lists:Lists"),
    "passkey": "trainer.evals.tasks.passkey:Passkey",
    **dict.fromkeys(("needle_single", "needle_multikey", "needle_haystack"), "trainer.evals.tasks.needle:Needle"),
    "variables": "trainer.evals.tasks.variables:Variables",
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa5"), "trainer.evals.tasks.babi:Babi"),
}
"""Made from the task's name, the settings, and for tasks in words the tokenizer."""


class IdTokenizer:
    """Stands in for a tokenizer where samples are made of ids: there is no text. The last id is padding."""

    def __init__(self, ids: int) -> None:
        self.vocab_size = ids + 1
        self.eos_id = self.pad_id = ids

    def encode_batch(self, texts: Any) -> list[np.ndarray]:
        """Refused: raises ValueError."""
        raise ValueError("a task of ids has no words")

    def character_ends(self, text: str) -> np.ndarray:
        """Refused: raises ValueError."""
        raise ValueError("a task of ids has no words")

    def decode(self, ids: Any) -> str:
        """The ids as numbers."""
        return " ".join(str(int(i)) for i in ids)

    def fingerprint(self) -> str:
        """By its size."""
        return f"ids-{self.vocab_size}"


def is_synthetic(source: str) -> bool:
    """Whether ``data.source`` names a task."""
    return source.startswith(PREFIX)


def build_task(name: str, settings: SyntheticSection, tokenizer: Tokenizer | None) -> Task:
    """The task ``name``; those of ids need no tokenizer. Raises UserError for settings that cannot be."""
    module, _, cls = _CLASSES[name].partition(":")
    build, values = getattr(importlib.import_module(module), cls), settings.of(name)
    try:
        return build(name, values) if name in OF_IDS else build(name, values, tokenizer)
    except ValueError as error:
        raise UserError(f"data.synthetic: {error}") from None


def task_of(data: DataSection, settings: SyntheticSection | None = None) -> Task:
    """The task of ``data.source``, with ``settings`` instead of data.synthetic. Raises UserError."""
    name = data.source.removeprefix(PREFIX)
    return build_task(name, settings or data.synthetic, None if name in OF_IDS else load_tokenizer(data.tokenizer))


def tokenizer_of(data: DataSection) -> Tokenizer:
    """The tokenizer of the data, or what stands in for it. Raises UserError for one that cannot be loaded, or settings that cannot be."""
    name = data.source.removeprefix(PREFIX)
    if not is_synthetic(data.source) or name not in OF_IDS:
        return load_tokenizer(data.tokenizer)
    sizes = {build_task(name, stage, None).vocab_size for stage in data.synthetic.stages}  # pyright: ignore[reportAttributeAccessIssue]
    return IdTokenizer(max(sizes))


assert _CLASSES.keys() == DEFAULTS.keys()
