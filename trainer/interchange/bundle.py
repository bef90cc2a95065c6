"""The sources that an exported model of this product's own needs, as files of one flat folder that transformers can load.

transformers copies the file that ``auto_map`` names and what it imports relatively from the same folder, nothing else. So ``models.a.b``
becomes ``longstride_a_b.py``, and every ``from models.a.b import`` becomes ``from .longstride_a_b import``: the same code that trained.
Imports no torch.

Try alone: ``python -c "from trainer.interchange.bundle import model_sources; print(*model_sources())"``.
"""

from __future__ import annotations

import ast
from pathlib import Path

_ROOMS = Path(__file__).resolve().parents[2]
_ROOM = "models"
_TOP = ("configuration_longstride", "modeling_longstride")
_PROTOCOL = "models.memory.protocol"
OPTIONAL = ("flash_attn", "fla")
"""Packages that are imported only where they are asked for by name."""
_NOTE = "# Written by longstride export from longstride's own sources (Apache-2.0).\n"


def model_sources() -> dict[str, str]:
    """File name -> source: the two files that ``auto_map`` names and, of ``models/``, all that they import and all memory architectures."""
    folder = Path(__file__).resolve().parent
    sources = {f"{name}.py": (folder / f"{name}.py").read_text(encoding="utf-8") for name in _TOP}
    builders = _builders(_path(_PROTOCOL).read_text(encoding="utf-8"))
    # What is imported by name only when it is asked for: transformers must find it too.
    found = "".join(f"from {module} import build as _{_flat(module)}  # noqa: F401\n" for module in builders)
    sources["modeling_longstride.py"] += f"\n{found}"
    modules: dict[str, str] = {}
    open_modules = sorted({module for source in sources.values() for module in _imported(source)})
    while open_modules:
        module = open_modules.pop()
        if module not in modules:
            modules[module] = _path(module).read_text(encoding="utf-8")
            open_modules += _imported(modules[module])
    for module, source in sorted(modules.items()):
        sources[f"{_flat(module)}.py"] = source
    return {name: _NOTE + _relative(source, builders) for name, source in sources.items()}


def _path(module: str) -> Path:
    return _ROOMS / (module.replace(".", "/") + ".py")


def _flat(module: str) -> str:
    return "longstride_" + module.removeprefix(f"{_ROOM}.").replace(".", "_")


def _imports(source: str) -> list[ast.ImportFrom]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == _ROOM for alias in node.names):
            raise ValueError(f"line {node.lineno}: 'import models...' cannot be exported; write 'from models... import'")
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in (_ROOM, "trainer"):
            found.append(node)
    return found


def _optional(source: str) -> list[ast.ImportFrom]:
    """Imports of packages that a model runs without."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and not node.level]
    return [node for node in found if (node.module or "").partition(".")[0] in OPTIONAL]


def _imported(source: str) -> list[str]:
    return [node.module for node in _imports(source) if node.module and node.module.startswith(f"{_ROOM}.")]


def _builders(protocol: str) -> list[str]:
    """The modules that ``BUILDERS`` names."""
    for node in ast.parse(protocol).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "BUILDERS" and isinstance(node, ast.AnnAssign) and node.value is not None:
            return sorted(ast.literal_eval(node.value).values())
    raise ValueError(f"{_PROTOCOL} has no BUILDERS")


def _relative(source: str, builders: list[str]) -> str:
    """``source`` with its imports of ``models`` and of the other top file made relative, and the names in ``BUILDERS`` too."""
    lines = source.splitlines(keepends=True)
    for node in _imports(source):
        assert node.module is not None
        old = f"from {node.module} import"
        name = _flat(node.module) if node.module.startswith(f"{_ROOM}.") else node.module.rpartition(".")[2]
        if old not in lines[node.lineno - 1]:
            raise ValueError(f"line {node.lineno}: an import that cannot be exported: {lines[node.lineno - 1].strip()}")
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(old, f"from .{name} import")
    for node in _optional(source):
        indent, line = " " * node.col_offset, lines[node.lineno - 1].strip()
        # transformers asks for every package that is imported outside of a try.
        lines[node.lineno - 1] = f"{indent}try:\n{indent}    {line}\n{indent}except ImportError:\n{indent}    raise\n"
    text = "".join(lines)
    for module in builders:
        text = text.replace(f'"{module}"', f'".{_flat(module)}"')
    return text
