"""HTML pages that need nothing beside themselves, from the templates."""

import os
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **content: Any) -> str:
    """The template with this content and the common style."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(content, style=style)


def write_page(text: str, output: Path) -> Path:
    """Replaces an older page in one step, and returns where it is."""
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        return unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
