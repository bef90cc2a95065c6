"""Hierarchical clusters of documents, for layers that fetch parameters by document (``data.cluster_key``): k-means, level after level.

A document is the words of its beginning: hashed to SIZE numbers with signs, weighted by log(1 + count) and by how few documents have
the word, of unit length. Spherical k-means divides all documents into clusters, each cluster's documents into clusters, and so on. The
same documents and seed give the same clusters anywhere; the centres are kept, so that documents to come find theirs by going down the
tree to the nearest centre. Imports no torch. Legend: N documents, D = SIZE, K clusters of one split.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.errors import UserError
from trainer.data.documents import BadDocument, Document, Source

SIZE = 256
"""Numbers that stand for a document."""
CHARACTERS = 65_536
"""Of a document's beginning that are read for them."""
_BUCKETS = 1 << 16
_WORD = re.compile(r"\w+")
_TURNS = 25
_STARTS = 8
"""Of every split, each with other first centres; the best is kept."""


def documents_of(source: Source) -> Iterator[Document]:
    """All documents of a source, in order. Raises UserError at one that cannot be used."""
    for unit in source.units():
        for _, item in source.read(unit):
            if isinstance(item, BadDocument):
                raise UserError(f"{item.origin}: {item.detail}\nrepair it, or leave it out of the source")
            yield item


def _words(text: str) -> Counter[int]:
    """How often each word is there, by its hash of 32 bits."""
    return Counter(zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text[:CHARACTERS].lower()))


def document_frequencies(texts: Iterator[str]) -> np.ndarray:
    """How many documents have a word of each bucket, [_BUCKETS], and in the last place how many documents there are."""
    found = np.zeros(_BUCKETS + 1, dtype=np.int64)
    for text in texts:
        found[np.unique(np.fromiter(_words(text), dtype=np.int64) % _BUCKETS)] += 1
        found[-1] += 1
    return found


def features(text: str, frequencies: np.ndarray) -> np.ndarray:
    """What stands for one document, [D] float32 of unit length (zero for a text without words)."""
    counts = _words(text)
    hashes = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
    rare = np.log1p(frequencies[-1] / np.maximum(frequencies[hashes % _BUCKETS], 1))
    weights = np.log1p(np.fromiter(counts.values(), dtype=np.float64, count=len(counts))) * rare
    signs = np.where(hashes >> 31 & 1, 1.0, -1.0)
    found_D = np.bincount(hashes // _BUCKETS % SIZE, weights=weights * signs, minlength=SIZE)
    length = np.linalg.norm(found_D)
    return (found_D / length if length > 0 else found_D).astype(np.float32)


@dataclass(frozen=True)
class Tree:
    """Centres of all clusters, level by level: [clusters of the level, D]; zero where a cluster was never used."""

    branching: tuple[int, ...]
    frequencies: np.ndarray
    centres: tuple[np.ndarray, ...]

    def cluster(self, features_D: np.ndarray) -> int:
        """Of the lowest level: down the tree, at every level the used child with the nearest centre."""
        found = 0
        for split, centres in zip(self.branching, self.centres, strict=True):
            children = centres[found * split : (found + 1) * split]
            nearness = np.where(children.any(1), children @ features_D, -np.inf)
            found = found * split + int(nearness.argmax())
        return found

    def save(self, path: Path) -> None:
        """As a file of numpy arrays; ``path`` is written as it is, whatever its name."""
        levels = {f"centres_{i}": level for i, level in enumerate(self.centres)}
        with path.open("wb") as file:
            np.savez(file, branching=np.array(self.branching), frequencies=self.frequencies, **levels)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def load(path: Path) -> Tree:
        """Raises UserError for a file that is none."""
        try:
            with np.load(path, allow_pickle=False) as held:
                branching = tuple(int(split) for split in held["branching"])
                centres = tuple(held[f"centres_{i}"] for i in range(len(branching)))
                tree = Tree(branching, held["frequencies"], centres)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"--like: {path} holds no centres of clusters: {error}") from error
        counts = np.cumprod(branching)
        if any(level.shape != (count, SIZE) for level, count in zip(centres, counts, strict=True)) or len(tree.frequencies) != _BUCKETS + 1:
            raise UserError(f"--like: {path} holds centres of another version; make it again with `longstride cluster`")
        return tree


def grow(features_ND: np.ndarray, frequencies: np.ndarray, branching: Sequence[int], seed: int = 0) -> Tree:
    """The tree of these documents. A cluster with fewer documents than children leaves some unused."""
    centres = []
    place_N = np.zeros(len(features_ND), dtype=np.int64)
    for level, split in enumerate(branching):
        level_centres = np.zeros((int(np.prod(branching[: level + 1])), SIZE), dtype=np.float32)
        parents_N = place_N
        place_N = np.zeros_like(parents_N)
        for parent in np.unique(parents_N):
            mine = np.flatnonzero(parents_N == parent)
            found_KD, label_N = _split(features_ND[mine], split, np.random.default_rng([seed, level, int(parent)]))
            level_centres[parent * split : parent * split + len(found_KD)] = found_KD
            place_N[mine] = parent * split + label_N
        centres.append(level_centres)
    return Tree(tuple(branching), frequencies, tuple(centres))


def _split(x_ND: np.ndarray, k: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(centres of unit length, at most ``k``; each document's) by spherical k-means."""
    found = [_means(x_ND, k, draw) for _ in range(_STARTS)]
    return max(found, key=lambda one: float((x_ND * one[0][one[1]]).sum(dtype=np.float64)))


def _means(x_ND: np.ndarray, k: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """From k-means++ centres."""
    first = x_ND[draw.integers(len(x_ND))]
    chosen = [first if first.any() else np.full(SIZE, SIZE**-0.5, dtype=np.float32)]
    while len(chosen) < k:
        away_N = np.clip(1 - (x_ND @ np.stack(chosen).T).max(1), 0, None).astype(np.float64)
        away_N[away_N < 1e-6] = 0
        if not away_N.any():
            break
        chosen.append(x_ND[draw.choice(len(x_ND), p=away_N / away_N.sum())])
    centres_KD = np.stack(chosen)
    label_N = (x_ND @ centres_KD.T).argmax(1)
    for _ in range(_TURNS):
        for i in range(len(centres_KD)):
            middle_D = x_ND[label_N == i].sum(0)
            length = np.linalg.norm(middle_D)
            centres_KD[i] = middle_D / length if length > 0 else centres_KD[i]
        before_N, label_N = label_N, (x_ND @ centres_KD.T).argmax(1)
        if (before_N == label_N).all():
            break
    return centres_KD, label_N
