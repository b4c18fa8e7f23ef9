"""Parts to a corpus: the last act of a preparation."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.indexed import IndexedDataset, IndexedWriter
from data.parts import PartReport, SplitCount, part_directory, token_dtype
from data.plan import FILES, FORMAT, SPLITS
from data.publish import publish
from data.tokenizer import Tokenizer


def merge_parts(work: Path, output: Path, num_parts: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Concatenates all parts, moves the corpus into `output` and removes `work`; returns the content of meta.json.

    meta.json is moved last: a directory that holds it is a complete corpus, and until then the parts stay.
    Raises ValueError if a split is empty (the parts are removed then: other settings are needed) or the disk too small.
    """
    tokenizer = Tokenizer(work / "tokenizer.model")
    reports = [PartReport.read(part_directory(work, index)) for index in range(num_parts)]
    _check_splits(reports, plan["settings"]["valid_fraction"], work)
    _check_space(work, output, num_parts)
    merged = work / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    publish(merged / "tokenizer.model", tokenizer.path.read_bytes())
    splits: dict[str, Any] = {}
    for split in SPLITS:
        count = SplitCount()
        with IndexedWriter(merged / split, token_dtype(tokenizer.vocab_size)) as writer:
            for index in tqdm(range(num_parts), desc=f"merging {split}", unit="part", leave=False):
                part = reports[index].splits[split]
                dataset = IndexedDataset(part_directory(work, index) / split)
                assert (dataset.num_tokens, len(dataset)) == (part.tokens, part.documents), (dataset.prefix, part)
                writer.extend(dataset)
                count.add(part.tokens, part.bytes, part.documents)
        splits[split] = {**vars(count), "sha256": writer.sha256}
    meta = _describe(plan, tokenizer, reports, splits)
    publish(merged / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())
    for name in FILES:
        os.replace(merged / name, output / name)
    shutil.rmtree(work, ignore_errors=True)
    return meta


def _describe(
    plan: dict[str, Any], tokenizer: Tokenizer, reports: list[PartReport], splits: dict[str, Any]
) -> dict[str, Any]:
    sources = [source for report in reports for source in report.sources]
    skipped: dict[str, int] = {}
    for report in reports:
        for reason, count in report.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    packages = ["sentencepiece", "numpy", "pyarrow", "datasets"]
    return {
        "format": FORMAT,
        "settings": plan["settings"],
        "facts": plan["facts"],
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "eos_id": tokenizer.eos_id,
            "bos_id": tokenizer.bos_id,
            "unk_id": tokenizer.unk_id,
        },
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "splits": splits,
        "skipped": skipped,
        # Of the sources' own digests, one after the other: one number that stands for the whole text.
        "sha256": hashlib.sha256("".join(str(source["sha256"]) for source in sources).encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "sources": [{**planned, **source} for planned, source in zip(plan["sources"], sources, strict=True)],
    }


def _check_splits(reports: list[PartReport], valid_fraction: float, work: Path) -> None:
    documents = {split: sum(report.splits[split].documents for report in reports) for split in SPLITS}
    total = sum(documents.values())
    if total and documents["train"] and (documents["valid"] or valid_fraction == 0):
        return
    shutil.rmtree(work)
    if not total:
        raise ValueError(
            f"--input: no document with text (skipped: {sum(sum(report.skipped.values()) for report in reports)}); "
            "a corpus must hold some; check the files and --text-field"
        )
    empty = "held-out" if documents["train"] else "training"
    raise ValueError(
        f"--valid-fraction: value {valid_fraction} leaves the {empty} split of {total} document(s) empty; a document "
        "falls on a side by its hash; choose another fraction (0 for no held-out split) or give more, shorter documents"
    )


def _check_space(work: Path, output: Path, num_parts: int) -> None:
    needed = sum(path.stat().st_size for index in range(num_parts) for path in part_directory(work, index).iterdir())
    free = shutil.disk_usage(output).free
    if needed > free:
        raise ValueError(
            f"--output: {output} has {free / 1e9:.1f} GB free; merging the parts needs {needed / 1e9:.1f} GB; "
            "free space and run the same command again: the parts are kept"
        )
