"""Compile a C++ source on first use, without importing torch.

One source file becomes one shared library with C functions, called through ctypes. Libraries are kept in the user's cache directory
under a name that holds a hash of source, flags, compiler and torch version, so a change of any of them compiles anew (a few
seconds, once). torch's own extension loader would do, but it imports torch, and ``fake_cuda.cpp`` must be loaded before that.

Try alone: ``python -m models.native``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from platformdirs import user_cache_dir


class NoCompiler(RuntimeError):
    """There is no C++ compiler, or it cannot compile the source. The message is for people."""


def build(path: Path, *, with_torch: bool, with_cuda: bool = False, more: tuple[str, ...] = ()) -> Path:
    """The shared library compiled from ``path``; compiles only what is not in the cache.

    ``with_cuda``: against the CUDA part of torch too. ``more``: further flags. Raises NoCompiler with the
    remedy when there is no compiler or it fails, or no headers of CUDA.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompiler(f"{path.name} needs a C++ compiler; on Debian or Ubuntu: apt-get install g++")
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", *more, *(_torch_flags() if with_torch else []), *(_cuda_flags() if with_cuda else [])]
    digest = hashlib.sha256("\0".join([_text(path), *flags, _compiler_version(compiler), _torch_version() if with_torch else ""]).encode())
    library = cache_dir() / f"{path.stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        _compile([compiler, *flags[:4], *more, str(path), *flags[4 + len(more) :]], library)
    return library


def cache_dir() -> Path:
    """Where compiled libraries and traces are kept; created when missing, a temporary directory where that is not possible."""
    path = Path(user_cache_dir("longstride"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        path = Path(tempfile.gettempdir()) / f"longstride-{Path.home().name}"
        path.mkdir(parents=True, exist_ok=True)
    return path


def _text(path: Path) -> str:
    """The source with the headers beside it that it includes."""
    text = path.read_text()
    return "".join([text, *(_text(path.parent / name) for name in re.findall(r'^#include "(\w+\.h)"', text, re.MULTILINE))])


def _compile(command: list[str], library: Path) -> None:
    # Two processes may compile at once: each into its own file, the rename is atomic.
    with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as file:
        temporary = Path(file.name)
    try:
        done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True)
        if done.returncode:
            raise NoCompiler(f"{command[0]} could not compile {library.stem}: {done.stderr.strip().splitlines()[0][:300]}")
        temporary.replace(library)
    finally:
        temporary.unlink(missing_ok=True)


def _torch_flags() -> list[str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NoCompiler("torch is not installed")
    root = Path(spec.origin).parent
    include, lib = root / "include", root / "lib"
    flags = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    return [*flags, "-std=c++20"]  # the headers of torch 2.13 need it; a later -std wins


def _cuda_flags() -> list[str]:
    """Where the headers are that c10/cuda includes: packages that come with a CUDA build of torch bring them, or there is a toolkit."""
    packages = {name: importlib.util.find_spec(name) for name in ("triton", "nvidia")}
    roots = [Path(place) for spec in packages.values() if spec is not None for place in spec.submodule_search_locations or []]
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + [Path("/usr/local/cuda")]
    places = [root / "backends/nvidia/include" for root in roots] + [found for root in roots for found in sorted(root.glob("*/include"))]
    for place in [*places, *(toolkit / "include" for toolkit in toolkits)]:
        if (place / "cuda_runtime.h").is_file() and (place / "crt/host_config.h").is_file():
            return [f"-I{place}", "-lc10_cuda"]
    raise NoCompiler("there are no headers of CUDA: neither in the packages triton and nvidia nor under CUDA_HOME or /usr/local/cuda")


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


if __name__ == "__main__":
    print(f"native libraries are kept in {cache_dir()}")
