"""Clusters of documents from the data to the batch: every token has its document's, in files, tables, streams and resumed runs."""

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.batch import Batch
from models.config import ModelConfig
from models.errors import UserError
from tests.trainer.data.corpus import run_config, texts
from trainer.config import DataSection, RunConfig
from trainer.data.build import build_data, prepare
from trainer.data.packing import Packing, pack

MODEL = {"feedforward": ["hierarchical"], "hierarchical": {"branching": [2, 3], "units": [4, 4]}}
PAD = 9_999_999


def corpus(path: Path, values: list[Any] | None = None) -> Path:
    lines = []
    for i, text in enumerate(texts()):
        cluster = i * 5 % 6 if values is None else values[i % len(values)]
        lines.append(json.dumps({"text": text, "prompt": 2, "cluster": cluster}))
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(path: Path, cache: Path, **data: Any) -> RunConfig:
    config = run_config(path, cache, **{"grad_accum": 2, **data})
    values = config.model_dump(mode="json") | {"model": MODEL, "optim": {"preset": "adamw_8bit"}}
    values["data"] |= {"cluster_key": "cluster"}
    return RunConfig.model_validate(values)


def cluster_at(batch: Batch, row: int, token: int) -> int:
    return [cluster for start, cluster in batch.bounds.clusters[row] if start <= token][-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=12), st.integers(1, 50), st.booleans())
def test_every_token_has_its_document_s(documents: list[tuple[int, int]], seq_len: int, mask: bool) -> None:
    packing = Packing(np.array([n for n, _ in documents]), seq_len, 0, "none")
    stream = [cluster for n, cluster in documents for _ in range(n)]
    for i in range(packing.n_sequences):
        pieces = packing.pieces(i)
        fragments = [np.arange(p.start, p.stop) for p in pieces]
        found = pack(fragments, seq_len, mask, PAD, clusters=[documents[p.document][1] for p in pieces]).clusters
        own = stream[i * seq_len : (i + 1) * seq_len]
        wanted = own + [-1] * (seq_len - len(own))
        assert [[c for start, c in found if start <= t][-1] for t in range(seq_len)] == wanted
        assert all(a[1] != b[1] for a, b in pairwise(found)), "neighbours of one cluster are one stretch"


@pytest.mark.parametrize("mode", [{}, {"document_mask": False}, {"streaming": True}, {"prefix_key": "prompt"}])
def test_batches_of_files_streams_and_resumed_runs(tmp_path: Path, mode: dict[str, Any]) -> None:
    config = config_of(corpus(tmp_path / "a.jsonl"), tmp_path / "cache", shuffle="none", **mode)
    stream = [i * 5 % 6 for i, text in enumerate(texts()) for _ in [*text.encode(), 256]]
    with build_data(config).train() as data:
        steps = [(batches, json.loads(json.dumps(cursor))) for batches, cursor in islice(data, -(-len(stream) // 32))]
    flat = [batch for batches, _ in steps for batch in batches]
    for first in range(0, len(stream), 16):
        for t in range(min(16, len(stream) - first)):
            assert cluster_at(flat[first // 16], 0, t) == stream[first + t]
    with build_data(config).train(steps[1][1]) as data:
        batches, _ = next(data)
    assert [b.bounds for b in batches] == [b.bounds for b in steps[2][0]]


def test_tables_and_held_out_batches_read_the_same(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in corpus(tmp_path / "a.jsonl").read_text().splitlines()]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found = []
    for kind in ("jsonl", "parquet", "arrow"):
        config = config_of(tmp_path / f"a.{kind}", tmp_path / "cache", source=kind, valid_fraction=0.3, micro_batch_size=3)
        data = build_data(config)
        with data.train() as steps:
            found.append([b.bounds for batches, _ in islice(steps, 6) for b in batches] + [b.bounds for b in data.valid(4)])
    assert found[0] == found[1] == found[2]
    last = found[0][-1]  # fewer held-out sequences than rows: padding has no cluster
    assert last.clusters[-1] == ((0, -1),) and any(cluster >= 0 for _, cluster in last.clusters[0])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0, None], "is missing, not the number of a cluster"),
        ([0, "3"], "is '3', not the number of a cluster"),
        ([0, True], "is 'True', not"),
        ([0, -1], r"is -1, and model.hierarchical.branching has clusters 0 to 5"),
        ([0, 6], r"is 6, and"),
    ],
)
def test_documents_without_a_cluster_are_bad(tmp_path: Path, values: list[Any], said: str) -> None:
    path = corpus(tmp_path / "a.jsonl", values)
    with pytest.raises(UserError, match=rf"a\.jsonl line 2: 'cluster' \(data\.cluster_key\) {said}"):
        prepare(config_of(path, tmp_path / "cache"))
    facts = prepare(config_of(path, tmp_path / "cache", on_bad_document="skip"))
    assert facts["skipped"] == {"bad_cluster": 6} and facts["train_documents"] == 6


def test_a_table_without_the_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'cluster' \(columns: text\); data\.cluster_key names it"):
        prepare(config_of(tmp_path / "a.parquet", tmp_path / "cache", source="parquet"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data": {"source": "text", "path": "x", "cluster_key": "c"}}, "data.cluster_key is not read by source 'text'"),
        ({"data": {"source": "jsonl", "path": "x", "cluster_key": "text"}}, "data.cluster_key and data.text_field both name 'text'"),
        ({"data": {"source": "jsonl", "path": "x", "cluster_key": "p", "prefix_key": "p"}}, "data.cluster_key and data.prefix_key both"),
        ({"data": {"source": "jsonl", "path": "x", "cluster_key": "c"}}, "data.cluster_key is read by layers of model.feedforward hier"),
        ({"model": MODEL}, "model.feedforward hierarchical fetches parameters by the clusters of documents: set data.cluster_key"),
    ],
)
def test_settings_that_contradict_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunConfig.model_validate(values)


def test_the_store_is_another_one_with_clusters(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl")
    with_clusters = build_data(config_of(path, tmp_path / "cache"))
    plain = build_data(RunConfig(data=DataSection.model_validate(with_clusters_data(path, tmp_path / "cache")), model=ModelConfig()))
    assert with_clusters.describe()["store"] != plain.describe()["store"]


def with_clusters_data(path: Path, cache: Path) -> dict[str, Any]:
    return {"source": "jsonl", "path": str(path), "cache_dir": str(cache), "seq_len": 16, "valid_fraction": 0.0, "tokenize_workers": 1}
