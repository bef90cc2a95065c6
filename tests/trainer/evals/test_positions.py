"""Loss by position: every bucket is the mean of the losses at its positions; documents that are long enough are needed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.errors import UserError
from tests.trainer.data.corpus import write_jsonl
from trainer.config import RunConfig
from trainer.evals import positions


class Told:
    """A reader whose loss of a token is its position plus its label, told in chunks of 50."""

    def refused(self, length: int) -> str | None:
        return "too long for this one" if length > 10_000 else None

    def losses(self, tokens_BT: np.ndarray, labels_BT: np.ndarray) -> Any:
        assert (tokens_BT[:, 1:] == labels_BT[:, :-1]).all()
        for start in range(0, tokens_BT.shape[1], 50):
            labels = torch.from_numpy(labels_BT[:, start : start + 50])
            yield start, start + labels.shape[1], labels + torch.arange(start, start + labels.shape[1])


def test_buckets_double_and_are_means_over_documents() -> None:
    assert positions.bucket_edges(64) == [0, 64] and positions.bucket_edges(40) == [0, 40]
    assert positions.bucket_edges(300) == [0, 64, 128, 256, 300]
    documents = [np.full(301, value) for value in (0, 10)]
    result = positions.loss_by_position(Told(), lambda _: documents, (300,), torch.device("cpu"))  # type: ignore[arg-type]
    want = [(0, 64, 31.5 + 5, 128), (64, 128, 95.5 + 5, 128), (128, 256, 191.5 + 5, 256), (256, 300, 277.5 + 5, 88)]
    assert [(bucket.start, bucket.end, bucket.loss, bucket.tokens) for bucket in result.buckets] == want
    assert positions.lines(result)[2].split() == ["0", "to", "64", "36.5000"]
    assert positions.picture(result, "x").startswith(b"\x89PNG") and positions.content(result)["documents"] == {300: 2}
    with pytest.raises(UserError, match="too long for this one"):
        positions.loss_by_position(Told(), lambda _: documents, (300, 20_000), torch.device("cpu"))  # type: ignore[arg-type]


def test_long_documents_are_read_from_their_beginning_or_asked_for(tmp_path: Path) -> None:
    texts = [f"{n}" * (n * 10) for n in range(1, 10)]
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    data = {
        "source": "jsonl",
        "path": str(path),
        "valid_path": str(write_jsonl(tmp_path / "valid.jsonl", texts[2:])),
        "tokenize_workers": 1,
    }
    config = RunConfig.model_validate({"data": {**data, "cache_dir": str(tmp_path / "cache")}})
    found = positions.long_documents(config, None, 65, 2)
    assert [bytes(tokens.tolist()).decode() for tokens in found] == [texts[6][:66], texts[7][:66]], "two of those with more than 65"
    assert len(positions.long_documents(config, None, 65, 20)) == 3
    with pytest.raises(UserError, match="no held-out document has 101 tokens, the longest has 91"):
        positions.long_documents(config, None, 100, 2)
    with pytest.raises(UserError, match="reads held-out documents, and this run has none"):
        positions.long_documents(RunConfig.model_validate({"data": {"source": "synthetic/mqar"}}), None, 60, 2)
