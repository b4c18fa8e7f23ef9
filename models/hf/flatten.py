"""The modelling files of an export: the sources in `models/` and `ops/` themselves, each under a flat name.

`trust_remote_code` takes files that lie side by side and import each other relatively. `ops/rotary/reference.py` is
`ops__rotary__reference.py` there, and `from ops.precision import …` in it `from .ops__precision import …`. What the
layers of a model do not reach is left out, and so is every tier that needs more than torch. All else stays as it is
written, comments included: the exported model is no second implementation.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from models.config import ModelConfig
from ops.impl import GPU_ONLY

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("models", "ops")
TEMPLATES = "models.hf.templates"
MODEL = f"{TEMPLATES}.modeling_rondo"
ENTRIES = (f"{TEMPLATES}.configuration_rondo", MODEL)
NAMESPACE = f"{TEMPLATES}.op_namespace"
"""Whose NAMESPACE takes the place of "rondo" in the names of registered ops."""

LISTING = "\n\nif TYPE_CHECKING:  # transformers' loader copies, and watches, the files that this one names\n"

FOREIGN = {*GPU_ONLY, *GPU_ONLY.values()} - {"torch"}

HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Generated from Rondo's {path}; tiers that need more than torch are left out.
"""


@dataclass(frozen=True)
class Edit:
    """`text` in place of what lies between two offsets of a source."""

    start: int
    end: int
    text: str


@dataclass
class Source:
    """A text of Python, its tree, and where its lines begin."""

    text: str
    tree: ast.Module = field(init=False)
    offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        lines = self.text.splitlines(keepends=True)
        self.offsets = [0]
        for line in lines:
            self.offsets.append(self.offsets[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        """The offset of a position that `ast` gives; its columns count bytes."""
        begin = self.offsets[line - 1]
        row = self.text[begin : self.offsets[line]]
        return begin + len(row.encode()[:column].decode())

    def replace(self, node: ast.expr | ast.stmt, text: str) -> Edit:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return Edit(self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset), text)

    def without_lines(self, first: int, last: int) -> Edit:
        return Edit(self.offsets[first - 1], self.offsets[last], "")

    def text_after(self, edits: list[Edit]) -> str:
        text = self.text
        for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
            text = text[: edit.start] + edit.text + text[edit.end :]
        return text

    def after(self, edits: list[Edit]) -> "Source":
        return Source(self.text_after(edits)) if edits else self


def flatten(config: ModelConfig) -> dict[str, str]:
    """File name -> text of all that runs a model of `config`, in the order of names."""
    kinds = set(config.layers)
    texts: dict[str, str] = {}
    waiting = list(ENTRIES)
    while waiting:
        module = waiting.pop()
        if module not in texts:
            texts[module], needed = _flattened(module, kinds)
            waiting += needed
    listed = sorted(flat_name(module) for module in texts if module != MODEL)
    texts[MODEL] = (
        _after_docstring(texts[MODEL], "\nfrom typing import TYPE_CHECKING\n")
        + LISTING
        + "".join(f"    from .{name} import *\n" for name in listed)
    )
    return {f"{flat_name(module)}.py": _header(module) + texts[module] for module in sorted(texts, key=flat_name)}


def flat_name(module: str) -> str:
    return module.removeprefix(f"{TEMPLATES}.").replace(".", "__")


def _header(module: str) -> str:
    path = _path(module)
    assert path is not None, module
    return HEADER.format(path=path.relative_to(ROOT).as_posix())


def _flattened(module: str, kinds: set[str]) -> tuple[str, list[str]]:
    """The text of a module, and which modules it imports."""
    path = _path(module)
    assert path is not None, module
    source = Source(path.read_text(encoding="utf-8"))
    source = source.after([*_without_kernels(source, module), *_cut_tables(source, module, kinds)])
    renamed = source.after(_op_names(source))
    edits, needed = _relative_imports(renamed, module)
    text = renamed.text_after(edits)
    if renamed is not source:
        text = _after_docstring(text, f"\nfrom .{flat_name(NAMESPACE)} import NAMESPACE\n")
        needed.append(NAMESPACE)
    return re.sub(r"\n{4,}", "\n\n\n", text), needed


def _after_docstring(text: str, lines: str) -> str:
    source = Source(text)
    first = source.tree.body[0]
    assert ast.get_docstring(source.tree), text[:80]
    cut = source.offsets[first.end_lineno or first.lineno]
    return text[:cut] + lines + text[cut:]


# Where a name comes from


def _path(module: str) -> Path | None:
    """The file of a module of ours, None if there is none."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def resolve(module: str, name: str) -> tuple[str, str | None]:
    """(module, name) that `from module import name` means, seen through packages that hand names on; the name is None
    where it is a module itself."""
    path = _path(module)
    assert path is not None, module
    if path.name == "__init__.py":
        for node in _tree(path).body:
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                if (alias.asname or alias.name) == name and isinstance(node, ast.ImportFrom):
                    own = node.module == module
                    return (f"{module}.{alias.name}", None) if own else resolve(str(node.module), alias.name)
        if _path(f"{module}.{name}") is not None:
            return f"{module}.{name}", None
    return module, name


def _is_kernel(module: str) -> bool:
    """Whether a module is a tier that needs more than torch."""
    return module.split(".")[-1] in GPU_ONLY


def _relative_imports(source: Source, module: str) -> tuple[list[Edit], list[str]]:
    """Every import of ours made relative, and what is imported. A package's names that it only hands on are dropped."""
    path = _path(module)
    used = None  # by the package itself
    if path is not None and path.name == "__init__.py":
        used = {node.id for node in ast.walk(source.tree) if isinstance(node, ast.Name)}
    edits: list[Edit] = []
    needed: list[str] = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for root in (alias.name.split(".")[0] for alias in node.names):
                assert root not in ROOMS, f"{module}:{node.lineno}: import {root}; write from … import …"
                assert root not in FOREIGN, f"{module}:{node.lineno}: {root} outside a branch of its own"
        if not isinstance(node, ast.ImportFrom):
            continue
        root = str(node.module).split(".")[0]
        assert root not in FOREIGN, f"{module}:{node.lineno}: {root} outside a branch of its own"
        if root not in ROOMS:
            continue
        by_file: dict[str, list[str]] = {}
        for alias in node.names:
            bound = alias.asname or alias.name
            if used is not None and bound not in used:
                continue
            origin, name = resolve(str(node.module), alias.name)
            assert not _is_kernel(origin), f"{module}:{node.lineno}: {origin} outside a branch of its own"
            needed.append(origin)
            place, name = (f".{flat_name(origin)}", name) if name else (".", flat_name(origin))
            by_file.setdefault(place, []).append(name if name == bound else f"{name} as {bound}")
        lines = [_statement(place, names) for place, names in by_file.items()]
        if lines:
            edits.append(source.replace(node, ("\n" + " " * node.col_offset).join(lines)))
        else:
            edits.append(source.without_lines(node.lineno, node.end_lineno or node.lineno))
    return edits, needed


def _statement(place: str, names: list[str]) -> str:
    line = f"from {place} import {', '.join(names)}"
    return line if len(line) <= 120 else line.replace("import ", "import (\n    ").replace(", ", ",\n    ") + ",\n)"


# What is left out


def _without_kernels(source: Source, module: str) -> Iterator[Edit]:
    """Drops the branches that choose a tier which needs more than torch, and `__all__`."""
    nested: set[ast.AST] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assign) and any(isinstance(z, ast.Name) and z.id == "__all__" for z in node.targets):
            yield source.without_lines(node.lineno, node.end_lineno or node.lineno)
        if not isinstance(node, ast.If) or node in nested:
            continue
        branches = [node]
        while len(last := branches[-1].orelse) == 1 and isinstance(last[0], ast.If) and _is_elif(source, last[0]):
            branches.append(last[0])
        nested.update(branches)
        kept = [branch for branch in branches if not any(map(_imports_kernel, branch.body))]
        assert kept or not branches[-1].orelse, f"{module}:{node.lineno}: an else without an if would be left over"
        for branch in branches:
            if branch not in kept:
                yield source.without_lines(branch.lineno, branch.body[-1].end_lineno or branch.lineno)
        if kept and kept[0] is not branches[0]:
            start = source.at(kept[0].lineno, kept[0].col_offset)
            yield Edit(start, start + len("elif"), "if")


def _is_elif(source: Source, node: ast.If) -> bool:
    return source.text.startswith("elif", source.at(node.lineno, node.col_offset))


def _imports_kernel(node: ast.stmt) -> bool:
    if not isinstance(node, ast.ImportFrom) or str(node.module).split(".")[0] not in ROOMS:
        return False
    return any(_is_kernel(resolve(str(node.module), alias.name)[0]) for alias in node.names)


def _cut_tables(source: Source, module: str, kinds: set[str]) -> Iterator[Edit]:
    """Takes out of tables what is left out of the files: mixers of no layer, tiers, devices."""
    tables: Mapping[tuple[str, str], Callable[[str], bool]] = {
        ("models.mixers", "MIXERS"): lambda kind: kind in kinds,
        ("ops.impl", "IMPLEMENTATIONS"): lambda op: True,
        ("ops.impl", "AUTO"): lambda device: device == "cpu",  # whose choices run on every device
        ("ops.impl", "GPU_ONLY"): lambda tier: False,
    }
    wanted = {name: keep for (place, name), keep in tables.items() if place == module}
    for node in source.tree.body:
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id in wanted:
                yield source.replace(node.value, _cut_dict(source, node.value, wanted.pop(target.id)))
    assert not wanted, f"{module}: no table {', '.join(wanted)}"


def _cut_dict(source: Source, table: ast.Dict, keep: Callable[[str], bool]) -> str:
    entries = []
    for key, value in zip(table.keys, table.values, strict=True):
        name, text = ast.literal_eval(key or ast.Constant(None)), ast.get_source_segment(source.text, value)
        if isinstance(value, ast.Tuple):  # of implementations
            text = repr(tuple(tier for tier in ast.literal_eval(value) if tier not in GPU_ONLY))
        if keep(name):
            entries.append(f'    "{name}": {text},\n')
    return "{\n" + "".join(entries) + "}" if entries else "{}"


def _op_names(source: Source) -> list[Edit]:
    """Registered ops get names that belong to the export: in one process they would take the place of Rondo's own."""
    edits: list[Edit] = []
    for node in ast.walk(source.tree) if '"rondo::' in source.text else ():
        first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
        if not isinstance(first, ast.Constant) or not str(first.value).startswith("rondo::"):
            continue
        assert isinstance(node, ast.expr)
        start = source.at(node.lineno, node.col_offset)
        opening = 'f"rondo' if isinstance(node, ast.JoinedStr) else '"rondo'
        if source.text.startswith(opening, start):  # a docstring has three quotes
            edits.append(Edit(start, start + len(opening), 'f"{NAMESPACE}'))
    return edits
