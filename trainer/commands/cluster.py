"""The verb ``cluster``: documents of any source as JSON lines that say which cluster each belongs to."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from models.errors import UserError
from trainer.data.clustering import Tree, document_frequencies, documents_of, features, grow
from trainer.data.sources import open_source


def cluster(args: argparse.Namespace) -> int:
    """``longstride cluster``."""
    target, tree_path = Path(args.target), Path(args.target).with_suffix(".centres.npz")
    if target.suffix != ".jsonl":
        raise UserError(f"{target}: the documents are written as JSON lines; give it a name that ends in .jsonl")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no directory; make it first")
    for path in (target, *(() if args.like else (tree_path,))):
        if path.exists():
            raise UserError(f"{path} exists; give another name, or remove it")
    if args.source != "python_stdlib" and args.path is None:
        raise UserError(f"--path: source {args.source} needs the file, folder or glob that holds the documents")
    branching = _branching(args.branching)
    source = open_source(args.source, args.path, text_field=args.text_field, key="--path")
    if args.like:
        tree = Tree.load(Path(args.like))
        if branching and branching != tree.branching:
            raise UserError(f"--branching {args.branching} is not that of {args.like}, {_words(tree.branching)}; leave it out")
    elif not branching:
        raise UserError("--branching: say how many clusters each level divides into, such as 16,16 (model.hierarchical.branching)")
    else:
        frequencies = document_frequencies(document.text for document in documents_of(source))
        if not frequencies[-1]:
            raise UserError(f"--path: {args.path} holds no document")
        held = np.stack([features(document.text, frequencies) for document in documents_of(source)])
        tree = grow(held, frequencies, branching, args.seed)
    counts = np.zeros(int(np.prod(tree.branching)), dtype=np.int64)

    def write_documents(file: IO[bytes]) -> None:
        for document in documents_of(source):
            found = tree.cluster(features(document.text, tree.frequencies))
            counts[found] += 1
            file.write((json.dumps({"text": document.text, "cluster": found}, ensure_ascii=False) + "\n").encode())

    if not args.like:
        _written(tree_path, lambda file: tree.save(Path(file.name)))
    try:
        _written(target, write_documents)
    except BaseException:
        if not args.like:  # or the same command would be refused
            tree_path.unlink(missing_ok=True)
        raise
    print(f"{counts.sum()} documents in {(counts > 0).sum()} of {len(counts)} clusters ({_words(tree.branching)}): {target}")
    print(f"the largest has {counts.max()}; centres: {args.like or tree_path}")
    settings = f"data.source=jsonl data.path={target} data.cluster_key=cluster model.hierarchical.branching=[{_words(tree.branching)}]"
    print(f"train with {settings}")
    return 0


def _words(branching: tuple[int, ...]) -> str:
    return ",".join(map(str, branching))


def _branching(words: str | None) -> tuple[int, ...]:
    if words is None:
        return ()
    try:
        found = tuple(int(word) for word in words.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"--branching {words}: give whole numbers above 0, one for each level, such as 16,16")
    return found


def _written(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """A file that is there whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
