"""Imports point one way: the table of docs/design.md section 1, held against every import statement."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EVERYWHERE = {"torch", "numpy", "tqdm"} | set(sys.stdlib_module_names)
ROOMS = ("configs", "data", "eval", "models", "ops", "parallel", "training")

MAY_IMPORT = {
    "ops": {"ops", "triton"},
    "data": {"data", "sentencepiece", "datasets", "pyarrow"},
    "models": {"models", "ops", "safetensors"},
    "models/hf": {"models", "ops", "data.tokenizer", "transformers", "tokenizers", "safetensors", "sentencepiece"},
    "models/hf/__main__.py": {"models", "transformers", "configs.schema"},
    "training": {"training", "models"},
    "training/start.py": {*ROOMS},
    "parallel": {"parallel", "models", "ops", "training", "deepspeed"},
    "parallel/plan/__main__.py": {"parallel", "configs.schema"},
    "parallel/plan/scaling.py": {"parallel", "configs.schema"},
    "configs": {"configs", "models", "data", "training", "parallel", "pydantic", "ruamel"},
    "eval": {"eval", "models", "data", "configs", "ops", "matplotlib", "jinja2", "psutil"},
    "eval/compare.py": {"eval", "matplotlib", "ruamel"},
    "train.py": {*ROOMS},
    "benchmarks": {*ROOMS, "benchmarks", "transformers", "triton"},
}
LAZILY = {
    "models/hf": {"fla"},
    "ops": {"fla", "flash_attn"},
    "training": {"wandb"},
    "eval": {"lm_eval", "transformers"},
    "benchmarks": {"fla", "causal_conv1d", "liger_kernel", "matplotlib"},
}


def sources() -> list[Path]:
    rooms = [path for room in (*ROOMS, "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
    return [*rooms, ROOT / "train.py"]


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """(module, inside a function, line) of every import statement."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, lazy, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import; write it absolutely"
                found.extend((f"{child.module}.{alias.name}", lazy, child.lineno) for alias in child.names)
            visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def permitted(module: str, allowed: set[str]) -> bool:
    return module.split(".")[0] in allowed or any(module == name or module.startswith(f"{name}.") for name in allowed)


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if str(relative) in MAY_IMPORT:
        return str(relative)
    if relative.parts[:2] in (("models", "hf"), ("models", "hf.py")):
        return "models/hf"
    return relative.parts[0]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    for module, lazy, line in imports(path):
        allowed = EVERYWHERE | MAY_IMPORT[room] | (LAZILY.get(room, set()) if lazy else set())
        assert permitted(module, allowed), f"{path.relative_to(ROOT)}:{line}: {room} may not import {module}"
        if module.startswith("torch.distributed") and room != "parallel":
            raise AssertionError(f"{path.relative_to(ROOT)}:{line}: torch.distributed belongs in parallel/")


def test_the_table_catches_a_wrong_import(tmp_path: Path) -> None:
    source = tmp_path / "wrong.py"
    source.write_text("import deepspeed\nfrom torch import distributed\ndef f():\n    import wandb\n", encoding="utf-8")
    assert imports(source) == [("deepspeed", False, 1), ("torch.distributed", False, 2), ("wandb", True, 4)]
    assert not permitted("deepspeed", EVERYWHERE | MAY_IMPORT["models"])
    assert not permitted("data.loader", EVERYWHERE | MAY_IMPORT["models/hf"])
