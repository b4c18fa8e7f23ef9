"""The modelling files of an export are Rondo's own sources, and only those that its layers reach."""

import ast
import re
import sys
from pathlib import Path

import pytest

import models.hf.flatten
from models.hf.flatten import HEADER, LISTING, ROOT, flatten
from models.mixers import MIXERS
from ops.impl import GPU_ONLY
from tests.models.stacks import STACKS, stack_config

OURS = re.compile(r"^\s*(from|import)\s+(models|ops|parallel|data|training|eval|configs|train|tests)\b", re.MULTILINE)
LOADED = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)  # what transformers' loader finds


@pytest.fixture(scope="module")
def everything() -> dict[str, str]:
    return flatten(stack_config(STACKS["all"]))


def absolute_imports(text: str) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(str(node.module).split(".")[0])
    return roots


def test_files_import_each_other_and_torch_alone(everything: dict[str, str]) -> None:
    for name, text in everything.items():
        assert not OURS.search(text), name
        assert absolute_imports(text) <= {"torch", "transformers", *sys.stdlib_module_names}, name
        for imported in LOADED.findall(text):
            assert f"{imported}.py" in everything, (name, imported)
    assert OURS.search("x = 1\n    from ops.layout import Layout\n")


def test_the_loader_finds_every_file_from_the_first(everything: dict[str, str]) -> None:
    """It copies what the class's file names, and asks the files that are new for more: named at once, none is asked
    twice."""
    found = {f"{name}.py" for name in LOADED.findall(everything["modeling_rondo.py"])}
    assert found == everything.keys() - {"modeling_rondo.py"}


def test_same_files_each_time(everything: dict[str, str]) -> None:
    again = flatten(stack_config(STACKS["all"][::-1]))
    assert list(again.items()) == list(everything.items())


def original_of(text: str) -> Path:
    """The source that a file names in its header."""
    pattern = re.escape(HEADER).replace(re.escape("{path}"), "(?P<path>.+)")
    match = re.match(pattern, text)
    assert match is not None, text[:200]
    return ROOT / match["path"]


def bodies(tree: ast.AST) -> dict[str, str]:
    """Functions and classes, imports inside them left out, by name."""
    for node in ast.walk(tree):
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                kept = [statement for statement in statements if not isinstance(statement, ast.ImportFrom)]
                setattr(node, field, kept or [ast.Pass()])
    definitions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))  # type: ignore[attr-defined]
    return {node.name: ast.dump(node) for node in definitions}


def test_nothing_is_written_twice(everything: dict[str, str]) -> None:
    """Every function and class is the source's, but for branches that choose kernels and names of registered ops."""
    cut = set()
    for name, text in everything.items():
        path = original_of(text)
        source = path.read_text(encoding="utf-8")
        ours, theirs = bodies(ast.parse(source)), bodies(ast.parse(text))
        assert ours.keys() == theirs.keys(), name
        unequal = {key for key in ours if ours[key] != theirs[key]}
        cut |= unequal
        for key in unequal:
            kernels = any(f"'{tier}'" in ours[key] and f"'{tier}'" not in theirs[key] for tier in GPU_ONLY)
            assert kernels or "rondo::" in source, (name, key)
        header = HEADER.format(path=path.relative_to(ROOT).as_posix())
        added = set(text.splitlines()) - {*source.splitlines(), *header.splitlines()}
        odd = [line for line in added if not re.match(r"\s*(from \.|import |from typing|if TYPE_CHECKING)", line)]
        tables = name in ("models__mixers.py", "ops__impl.py")
        assert all("NAMESPACE" in line or tables or re.match(r"\s*[\w ]+,$|\)$", line) for line in odd), (name, odd)
    assert cut  # the comparison sees differences


def test_what_the_layers_do_not_reach_is_left_out() -> None:
    files = flatten(stack_config(STACKS["rglru"]))
    names = " ".join(files)
    assert "models__mixers__rglru.py" in files
    assert "ops__linear_scan__chunked.py" in files
    for absent in ("paralstm", "hgrn2", "delta", "diagonal", "attention", "gated_linear", "triton", "fla", "flex"):
        assert absent not in names, absent
    assert '"rglru": RGLRU' in files["models__mixers.py"]
    assert "hgrn2" not in files["models__mixers.py"]


@pytest.mark.parametrize("kind", MIXERS)
def test_tables_name_what_is_there(kind: str) -> None:
    files = flatten(stack_config(STACKS[kind]))
    scope: dict[str, object] = {"__name__": "impl"}
    exec(files["ops__impl.py"], scope)
    implementations = scope["IMPLEMENTATIONS"]
    assert isinstance(implementations, dict)
    assert not {tier for tiers in implementations.values() for tier in tiers} & GPU_ONLY.keys()
    assert implementations["rms_norm"] == ("chunked", "reference")
    with pytest.raises(ValueError, match="choose one of auto, chunked, reference"):
        scope["resolve_impl"]("rms_norm", "triton", "cuda")  # type: ignore[operator]
    assert scope["resolve_impl"]("rms_norm", "auto", "cuda") == "chunked"  # type: ignore[operator]


BRANCHES = '''"""An op."""

from ops.inner import chunked
from ops.inner.chunked import handed_on, used

__all__ = ["handed_on"]


def op(chosen):
    if chosen == "triton":
        from ops.inner import triton

        return triton.op()
    elif chosen == "reference":
        y = used()
    elif chosen == "fla":
        from ops.inner import fla as module

        y = module.op()
    else:
        y = chunked.op()
    return y
'''


def tree(root: Path, op: str) -> Path:
    """A repository of one op in two tiers."""
    for name, text in {
        "models/hf/templates/modeling_rondo.py": '"""A model."""\n\nfrom ops import op\n',
        "models/hf/templates/configuration_rondo.py": '"""A configuration."""\n',
        "models/hf/templates/op_namespace.py": '"""A namespace."""\n',
        "ops/__init__.py": '"""Ops."""\n\nfrom ops.inner import op\n',
        "ops/inner/__init__.py": op,
        "ops/inner/chunked.py": '"""A tier."""\n\n\ndef op():\n    return "rondo::op"\n\n\ndef used():\n    return 1\n',
        "ops/inner/triton.py": '"""Kernels."""\n\nimport triton\n',
        "ops/inner/fla.py": '"""Kernels."""\n\nimport fla\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_branches_of_kernels_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.hf.flatten, "ROOT", tree(tmp_path, BRANCHES))
    files = flatten(stack_config(STACKS["rglru"]))
    assert list(files) == [
        "configuration_rondo.py",
        "modeling_rondo.py",
        "op_namespace.py",
        "ops__inner.py",
        "ops__inner__chunked.py",
    ]
    assert files["modeling_rondo.py"].endswith(
        '"""A model."""\n\nfrom typing import TYPE_CHECKING\n\nfrom .ops__inner import op\n'
        + LISTING
        + "".join(f"    from .{name.removesuffix('.py')} import *\n" for name in files if name != "modeling_rondo.py")
    )
    assert files["ops__inner.py"].endswith(
        '''"""An op."""

from . import ops__inner__chunked as chunked
from .ops__inner__chunked import used


def op(chosen):
    if chosen == "reference":
        y = used()
    else:
        y = chunked.op()
    return y
'''
    )
    assert 'return f"{NAMESPACE}::op"' in files["ops__inner__chunked.py"]
    assert "from .op_namespace import NAMESPACE" in files["ops__inner__chunked.py"]


@pytest.mark.parametrize(
    ("op", "complaint"),
    [
        (
            '"""An op."""\n\nfrom ops.inner import triton\n\n\ndef op():\n    return triton\n',
            "ops.inner.triton outside",
        ),
        ('"""An op."""\n\nimport ops.inner\n\n\ndef op():\n    return ops\n', "write from … import …"),
        (
            '"""An op."""\n\n\ndef op(x):\n    if x:\n        from ops.inner import triton\n    else:\n        pass\n',
            "an else without an if",
        ),
        ('"""An op."""\n\n\ndef op(x):\n    import triton\n', "triton"),
    ],
)
def test_what_cannot_be_cut_is_no_export(
    op: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.hf.flatten, "ROOT", tree(tmp_path, op))
    with pytest.raises(AssertionError, match=complaint):
        flatten(stack_config(STACKS["rglru"]))
