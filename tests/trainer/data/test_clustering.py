"""Clusters of documents: found again whatever the order of topics, the same on every call, and written as files that runs read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from longstride import main
from trainer.data.clustering import SIZE, Tree, document_frequencies, features, grow

TOPICS = [[f"{place}{kind}{i}" for i in range(12)] for place in ("sea", "land") for kind in ("fish", "ship", "storm")]
"""Two worlds of three topics each; topics of one world share the words of WORLDS."""
WORLDS = [[f"{place}common{i}" for i in range(30)] for place in ("sea", "land")]


def corpus() -> tuple[list[str], list[int]]:
    draw = random.Random(0)
    topics = [draw.randrange(6) for _ in range(90)]
    texts = [
        " ".join(draw.choices(TOPICS[t], k=40) + draw.choices(WORLDS[t // 3], k=60) + draw.choices(["the", "of", "a"], k=20))
        for t in topics
    ]
    return texts, topics


def tree_of(texts: list[str], branching: tuple[int, ...] = (2, 3)) -> Tree:
    frequencies = document_frequencies(iter(texts))
    return grow(np.stack([features(text, frequencies) for text in texts]), frequencies, branching)


def test_topics_and_what_they_have_in_common_are_found_again() -> None:
    texts, topics = corpus()
    tree = tree_of(texts)
    found = [tree.cluster(features(text, tree.frequencies)) for text in texts]
    assert len({(a, b) for a, b in zip(topics, found, strict=True)}) == 6, "one cluster a topic"
    assert len({(a // 3, b // 3) for a, b in zip(topics, found, strict=True)}) == 2, "topics of one world under one cluster"


def test_the_same_documents_give_the_same_tree_and_a_saved_one_the_same_clusters(tmp_path: Path) -> None:
    texts, _ = corpus()
    one, other = tree_of(texts), tree_of(texts)
    assert all(np.array_equal(a, b) for a, b in zip(one.centres, other.centres, strict=True))
    one.save(tmp_path / "t.npz")
    kept = Tree.load(tmp_path / "t.npz")
    rows = [features(text, one.frequencies) for text in texts]
    assert np.array_equal(kept.frequencies, one.frequencies)
    assert [kept.cluster(row) for row in rows] == [one.cluster(row) for row in rows]


def test_fewer_documents_than_clusters_leave_some_unused() -> None:
    texts = ["alpha beta", "alpha beta", "gamma delta", "..."]  # the last has no words
    tree = tree_of(texts, (4, 3))
    found = [tree.cluster(features(text, tree.frequencies)) for text in texts]
    assert found[0] == found[1] != found[2] and all(0 <= cluster < 12 for cluster in found)
    assert not features("...", tree.frequencies).any() and tree.centres[1].shape == (12, SIZE)


def test_the_command_writes_what_runs_read_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts, topics = corpus()
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts[:60]))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[60:]))
    words = ["cluster", "out.jsonl", "--source", "jsonl", "--path", "raw.jsonl", "--text-field", "body", "--branching", "2,3"]
    assert main(words) == 0
    assert "60 documents in 6 of 6 clusters (2,3): out.jsonl" in capsys.readouterr().out
    assert main(["cluster", "more_out.jsonl", "--source", "jsonl", "--path", "more.jsonl", "--like", "out.centres.npz"]) == 0
    rows = [json.loads(line) for name in ("out", "more_out") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    assert len({(topic, row["cluster"]) for topic, row in zip(topics, rows, strict=True)}) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.jsonl", "more_out.jsonl", "out.centres.npz", "out.jsonl", "raw.jsonl"]
    capsys.readouterr()
    given = ["cluster", "x.jsonl", "--source", "jsonl", "--path", "more.jsonl"]
    for refused, said in (
        (words, "out.jsonl exists"),
        (["cluster", "x.txt"], "ends in .jsonl"),
        (["cluster", "absent/x.jsonl"], "absent is no directory; make it first"),
        (["cluster", "x.jsonl", "--source", "text"], "--path: source text needs"),
        (["cluster", "x.jsonl", "--source", "jsonl", "--path", "raw.jsonl", "--branching", "2,3"], "no text field 'text'"),
        (given, "--branching: say how many"),
        ([*given, "--branching", "2,x"], "--branching 2,x: give whole numbers"),
        ([*given, "--like", "raw.jsonl"], "raw.jsonl holds no centres"),
        (
            ["cluster", "x.jsonl", "--source", "jsonl", "--path", "more.jsonl", "--like", "out.centres.npz", "--branching", "3"],
            "not that of",
        ),
    ):
        assert main(refused) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()

    def full(descriptor: int) -> None:
        if (tmp_path / "x.centres.npz").exists():  # the second of the two
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert main([*given, "--branching", "2,3"]) == 2
    assert "cannot write x.jsonl: No space left" in capsys.readouterr().err and not list(tmp_path.glob("*x.*"))
    assert main([*given, "--branching", "2,3"]) == 0  # as if it had not been tried
