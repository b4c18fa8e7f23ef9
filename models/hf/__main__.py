"""`python -m models.hf export RUN|CHECKPOINT HF_DIR`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.hf",
        description="Hugging Face directories from Rondo's models.",
        epilog="example: python -m models.hf export runs/demo runs/demo/hf",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export_parser = commands.add_parser(
        "export",
        help="write a directory that transformers loads without Rondo",
        description="Write a trained Griffin as transformers' RecurrentGemmaForCausalLM with its tokenizer; logits, "
        "token ids and generation are compared with the original before the directory appears.",
        epilog="example: python -m models.hf export runs/demo runs/demo/hf --text README.md",
    )
    export_parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="run directory or checkpoint")
    export_parser.add_argument("target", type=Path, metavar="HF_DIR", help="directory to write, must not hold files")
    export_parser.add_argument(
        "--text", type=Path, action="append", default=[], metavar="FILE", help="also compare on it"
    )
    options = parser.parse_args(arguments)

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything lies on this machine
    from transformers.utils.logging import disable_progress_bar  # slow to import: --help need not wait for it

    from models.hf.export import export

    disable_progress_bar()
    try:
        texts = [path.read_text(encoding="utf-8") for path in options.text]
        agreement = export(options.source, options.target, texts)
    except (ValueError, OSError) as error:
        print(f"models.hf: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.target}: logits within {agreement.relative_difference:.1e} of the original over "
        f"{agreement.logits_tokens:,} tokens, {agreement.generated_tokens} tokens generated alike, "
        f"{agreement.texts} texts tokenized alike"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
