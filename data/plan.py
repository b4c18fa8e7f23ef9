"""What a corpus is made of and whether a directory holds it: the plan of a preparation, the meta.json of its result.

A plan is plain JSON: `settings` (what the user chose), `facts` (what describes sources such as python-stdlib) and
`sources` (name and size of each). meta.json holds the same three and what came out.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.indexed import IndexedDataset
from data.publish import publish

FORMAT = 1  # of meta.json
SPLITS = ("train", "valid")
FILES = (
    "train.bin",
    "train.idx",
    "valid.bin",
    "valid.idx",
    "tokenizer.model",
    "meta.json",
)  # in this order they appear


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json of a prepared directory; raises ValueError if it is damaged or of another format."""
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_text())
        found = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged; must be as data.prepare wrote it; prepare the corpus again") from error
    if found != FORMAT:
        raise ValueError(f"{path}: format {found}; this version reads format {FORMAT}; prepare the corpus again")
    return meta


def finished(directory: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """meta.json if the directory holds the corpus of this plan complete and undamaged, None if it holds none.

    Raises ValueError if it holds another corpus, or if a file no longer has the checksum in meta.json.
    """
    if not (directory / "meta.json").exists():
        return None
    meta = read_meta(directory)
    sources = [{"name": source["name"], "size": source["size"]} for source in meta["sources"]]
    _refuse_difference(directory, {"settings": meta["settings"], "facts": meta["facts"], "sources": sources}, plan)
    for split in SPLITS:
        dataset = IndexedDataset(directory / split)
        dataset.verify()
        if _sha256(dataset.bin_path) != meta["splits"][split]["sha256"]:
            raise ValueError(
                f"{dataset.bin_path}: its sha256 is not the one in meta.json; a corpus must be as it was written; "
                f"remove {directory} and run the same command again"
            )
    return meta


def claim(directory: Path, work: Path, plan: dict[str, Any]) -> None:
    """Makes the work directory of this plan, or finds it; raises ValueError if the directory holds something else."""
    if not work.exists():
        for name in FILES:
            if (directory / name).exists():
                raise ValueError(
                    f"--output: {directory / name} is in the way; the directory must not hold another corpus; "
                    "choose another or remove it"
                )
    work.mkdir(parents=True, exist_ok=True)
    publish(work / "plan.json", json.dumps(plan).encode())
    _refuse_difference(directory, json.loads((work / "plan.json").read_text()), plan)


def _refuse_difference(directory: Path, found: dict[str, Any], plan: dict[str, Any]) -> None:
    if found == plan:
        return
    keys = [key for key, value in plan["settings"].items() if found["settings"].get(key) != value]
    what = "sources of other names, sizes or versions"
    if keys:
        what = f"{keys[0]} {found['settings'].get(keys[0])!r}, here {plan['settings'][keys[0]]!r}"
    raise ValueError(
        f"--output: {directory} holds a corpus made with {what}; a directory must hold one corpus; "
        "choose another directory or remove it"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, desc=f"checking {path.name}", unit="B", unit_scale=True, leave=False) as bar,
    ):
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
