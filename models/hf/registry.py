"""The formats an export chooses from, in this order: the first that fits, unless one is named."""

import difflib

from models.config import ModelConfig
from models.hf.fla_models import GATED_DELTANET, HGRN2
from models.hf.formats import Format
from models.hf.olmo_hybrid import OLMO_HYBRID
from models.hf.recurrentgemma import RECURRENTGEMMA
from models.hf.remote import RONDO

FORMATS: tuple[Format, ...] = (RECURRENTGEMMA, OLMO_HYBRID, HGRN2, GATED_DELTANET, RONDO)
"""Those that other libraries load come first; the one with its own modelling files, and fits every model, last."""


def choose(config: ModelConfig, name: str | None = None) -> Format:
    """The format called `name`, or the first that fits `config`.

    Raises:
        ValueError: there is no such format, or the model does not fit, with every key that keeps it from that.
    """
    if name is not None:
        by_name = {known.name: known for known in FORMATS}
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"--format: {name!r} is none of {', '.join(by_name)}{hint}")
        candidates: tuple[Format, ...] = (by_name[name],)
    else:
        candidates = FORMATS
    reasons = {candidate: candidate.fits(config) for candidate in candidates}
    for candidate, problems in reasons.items():
        if not problems:
            return candidate
    lines = [f"\n{known.architecture}:" + "".join(f"\n  {line}" for line in found) for known, found in reasons.items()]
    raise ValueError(
        "the model is stored in none of the classes there are:"
        + "".join(lines)
        + "\ntrain with these values to export to it, choose another --format, or use the model through "
        "python -m eval.generate"
    )


def by_model_type(model_type: str) -> Format | None:
    """The format that a `config.json` of this `model_type` is imported from."""
    return next((known for known in FORMATS if known.model_type == model_type and known.model_config), None)
