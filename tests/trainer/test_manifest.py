"""A manifest sees every changed byte, in itself too."""

from __future__ import annotations

import os
import random

import pytest

from trainer.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    ManifestError,
    hash_files,
    read_manifest,
    split_by_size,
    verify,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "step_00000010"
    path.mkdir()
    for name, size in (("a", 0), ("b", 1), ("c", 5000)):
        (path / name).write_bytes(os.urandom(size))
    write_manifest(path, Manifest(10, 2, "cafe", {"torch": "2.13"}, hash_files(path, ["a", "b", "c"])))
    return path


def test_intact(folder):
    assert verify(folder) == []
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size, manifest.config_hash, manifest.files["c"].size) == (10, 2, "cafe", 5000)


def test_every_bit_of_the_manifest_matters(folder):
    path = folder / MANIFEST_NAME
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(ManifestError):
                Manifest.from_bytes(bytes(flipped))
    for length in range(len(data)):
        with pytest.raises(ManifestError):
            Manifest.from_bytes(data[:length])
    path.write_bytes(data[:-1])
    assert verify(folder) == [f"{MANIFEST_NAME}: its own checksum does not match"]


def test_flipped_bits_are_named(folder):
    rng = random.Random(0)
    for name in ("b", "c"):
        data = (folder / name).read_bytes()
        for _ in range(20):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(flipped)
            assert verify(folder) == [f"{name}: SHA-256 differs from the manifest"]
        (folder / name).write_bytes(data)


def test_truncated_missing_foreign_linked_and_moved(folder, tmp_path):
    (folder / "c").write_bytes((folder / "c").read_bytes()[:-1])
    (folder / "b").unlink()
    (folder / "d").write_text("planted")
    assert verify(folder) == ["d: not listed in the manifest", "b: No such file or directory", "c: 4999 bytes, the manifest says 5000"]
    (folder / MANIFEST_NAME).unlink()
    assert verify(folder) == [f"{MANIFEST_NAME}: No such file or directory"]
    assert verify(tmp_path / "nowhere") == [f"{MANIFEST_NAME}: No such file or directory"]


def test_a_link_is_not_followed(folder, tmp_path):
    outside = tmp_path / "outside"
    (folder / "b").rename(outside)
    (folder / "b").symlink_to(outside)
    assert [line.partition(":")[0] for line in verify(folder)] == ["b"]


def test_another_steps_directory_is_refused(folder):
    moved = folder.rename(folder.with_name("step_00000020"))
    assert verify(moved) == [f"{MANIFEST_NAME}: is of step 10, not of step_00000020"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", MANIFEST_NAME, "/etc/passwd"])
def test_names_outside_are_refused_even_if_consistent(name):
    data = Manifest(1, 1, "", {}, {name: FileEntry(0, "")}).to_bytes()
    with pytest.raises(ManifestError, match="outside"):
        Manifest.from_bytes(data)


def test_another_format_is_refused_by_name():
    with pytest.raises(ManifestError):
        Manifest.from_bytes(Manifest(1, 1, "", {}, {}).to_bytes().replace(b'"format": 1', b'"format": 2'))


def test_files_are_dealt_evenly_and_completely():
    files = {f"f{i}": FileEntry(size, "") for i, size in enumerate([100, 90, 50, 40, 10, 0, 0])}
    piles = split_by_size(files, 3)
    assert {name: entry for pile in piles for name, entry in pile.items()} == files
    assert [sum(entry.size for entry in pile.values()) for pile in piles] == [100, 100, 90]
    assert split_by_size({}, 2) == [{}, {}]
