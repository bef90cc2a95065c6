"""The built-in byte-level tokenizer as a Hugging Face ``tokenizer.json``: the same ids for every text. Imports no torch.

Try alone: ``pytest tests/trainer/interchange -k byte``.
"""

from __future__ import annotations

import json
from typing import Any

from trainer.data.tokenizers import ByteTokenizer

_SHOWN = {*range(33, 127), *range(161, 173), *range(174, 256)}
"""Bytes that the ByteLevel scheme (of GPT-2) spells as the character of that number; the others as characters from 256 on, in order."""


def tokenizer_files() -> dict[str, bytes]:
    """File name -> content."""
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in _SHOWN else next(others)): byte for byte in range(256)}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {"<eos>": ByteTokenizer.eos_id, "<pad>": ByteTokenizer.pad_id}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **special} for name, number in ids.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "vocab": vocabulary, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
