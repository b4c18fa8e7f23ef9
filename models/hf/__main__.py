"""`python -m models.hf export RUN|CHECKPOINT HF_DIR` and `python -m models.hf import HF_DIR CHECKPOINT`."""

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
    _add_export(commands)
    _add_import(commands)
    options = parser.parse_args(arguments)

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything lies on this machine
    from transformers.utils.logging import disable_progress_bar  # slow to import: --help need not wait for it

    disable_progress_bar()
    try:
        print(options.run(options))
    except (ValueError, OSError) as error:
        print(f"models.hf: {error}", file=sys.stderr)
        return 1
    return 0


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export",
        help="write a directory that transformers loads without Rondo",
        description="Write a trained model, with its tokenizer, as the first Hugging Face class that it fits; logits, "
        "token ids and generation are compared with the original before the directory appears.",
        epilog="example: python -m models.hf export runs/demo runs/demo/hf --text README.md",
    )
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="run directory or checkpoint")
    parser.add_argument("target", type=Path, metavar="HF_DIR", nargs="?", help="directory to write, must hold no files")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help="also compare on it")
    parser.add_argument("--format", metavar="NAME", help="the class to store it as, where several fit")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored weights")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (5GB)")
    parser.add_argument("--no-tokenizer", action="store_true", help="the model was trained on ids made elsewhere")
    parser.add_argument(
        "--plan", action="store_true", help="only show files and peak memory; RUN may be a run's YAML then"
    )
    parser.set_defaults(run=_export, parser=parser)


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "import",
        help="write a checkpoint that training goes on from",
        description="Read a model that was saved as one of the Hugging Face classes Rondo exports to, and write it as "
        "a checkpoint, with a run's YAML beside it. No code of the directory is run, and only safetensors are read.",
        epilog="example: python -m models.hf import downloads/recurrentgemma-2b runs/imported/recurrentgemma-2b",
    )
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="directory with config.json and safetensors")
    parser.add_argument("target", type=Path, metavar="CHECKPOINT", help="directory to write, must hold no files")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the directory's tokenizer.model alone")
    parser.add_argument("--no-check", action="store_true", help="do not compare logits with the class's own")
    parser.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> str:
    from models.hf.importing import import_directory

    directory, tokenizer, agreement = import_directory(
        options.source,
        options.target,
        with_tokenizer=not options.no_tokenizer,
        check=not options.no_check,
    )
    compared = "not compared with its class"
    if agreement is not None:
        difference, tokens = f"{agreement.relative_difference:.1e}", f"{agreement.logits_tokens:,}"
        compared = f"logits within {difference} of its class over {tokens} tokens"
    parameters = f"{directory.config.num_params():,} parameters of a {directory.stored_as.architecture}"
    lines = [
        f"{options.target}: {parameters}, {compared}",
        f"{options.target}.yaml: a run that trains it on; set its data",
    ]
    if directory.left_out:
        lines.append(f"left out, as the class computes nothing with them: {', '.join(directory.left_out)}")
    if tokenizer is None:
        lines.append(
            "no tokenizer: the directory's is no SentencePiece model (tokenizer.model), the only kind data.prepare "
            "takes; train on .bin/.idx corpora whose ids the model's own tokenizer made"
        )
    return "\n".join(lines)


def _plan(options: argparse.Namespace) -> str:
    from configs.schema import load_config
    from models.hf.export import DTYPES
    from models.hf.plan import plan_export, plan_text
    from models.hf.registry import choose
    from models.hf.weights import parse_size
    from models.restore import read_config, resolve_checkpoint

    described = options.source.suffix in (".yaml", ".yml")
    config = load_config(options.source).model if described else read_config(resolve_checkpoint(options.source))
    stored_as = choose(config, options.format)
    plan = plan_export(config, stored_as, DTYPES[options.dtype], parse_size(options.max_shard_size))
    return plan_text(plan, config, options.dtype)


def _export(options: argparse.Namespace) -> str:
    if options.plan:
        return _plan(options)
    if options.target is None:
        options.parser.error("the following arguments are required: HF_DIR")
    from models.hf.export import export
    from models.hf.weights import parse_size

    agreement = export(
        options.source,
        options.target,
        [_text(path) for path in options.text],
        format_name=options.format,
        dtype=options.dtype,
        max_shard_bytes=parse_size(options.max_shard_size),
        with_tokenizer=not options.no_tokenizer,
    )
    return (
        f"{options.target}: logits within {agreement.relative_difference:.1e} of the original over "
        f"{agreement.logits_tokens:,} tokens, the same most likely token at {agreement.top_1:.2%}, "
        f"{agreement.generated_tokens} tokens generated alike, {agreement.texts} texts tokenized alike"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text: {path}; must be a text in UTF-8 ({error}); name another, or leave it out") from error


if __name__ == "__main__":
    sys.exit(main())
