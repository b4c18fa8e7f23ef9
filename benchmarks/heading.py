"""What a file of results says before its figures."""

import datetime
from typing import Any

from training.environment import describe_environment


def heading() -> dict[str, Any]:
    """Date, versions, device and revision."""
    environment = describe_environment({})
    kept = ("python", "platform", "packages", "device", "cuda", "git_revision")
    return {"date": datetime.date.today().isoformat(), **{key: environment[key] for key in kept}}
