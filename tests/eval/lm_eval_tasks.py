"""A directory of lm-eval tasks whose data lie beside them: multiple choice, rolling likelihood and generation."""

from pathlib import Path

DATA = """
import datasets

QUESTIONS = [
    ("The grant of a license is", ["perpetual and free.", "a kind of fish.", "not", "worldwide"], 0),
    ("def f(x):\\n    return", [" x", " nothing at all", "ing"], 1),
    ("You may reproduce copies of the Work ", ["in any medium,", "never", "naïvely 😀"], 2),
    ("", ["Apache License", "x"], 0),
]
TEXTS = ["Licensed under the Apache License.", "é", "a\\n\\n  b\\tc 12345 " * 9, "Unless required by law " * 30]


def questions(**kwargs):
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    return {"test": datasets.Dataset.from_list(rows)}


def texts(**kwargs):
    return {"test": datasets.Dataset.from_list([{"text": text, "first": text[:9], "rest": text[9:]} for text in TEXTS])}
"""

CHOICE = """
task: tiny_choice
custom_dataset: !function data.questions
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""

ROLLING = """
task: tiny_rolling
custom_dataset: !function data.texts
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""

GENERATION = """
task: tiny_generation
custom_dataset: !function data.texts
output_type: generate_until
test_split: test
doc_to_text: "{{first}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: ["\\n\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

NAMES = ("tiny_choice", "tiny_rolling", "tiny_generation")


def write_tasks(directory: Path) -> Path:
    directory.mkdir()
    (directory / "data.py").write_text(DATA, encoding="utf-8")
    for name, text in zip(NAMES, (CHOICE, ROLLING, GENERATION), strict=True):
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return directory
