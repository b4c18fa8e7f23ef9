"""Files that exist whole or not at all."""

import os
import uuid
from pathlib import Path


def publish(path: Path, content: bytes) -> None:
    """Writes a small file that appears under `path` only once it is on disk; whoever publishes first wins."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, never replaces what another process has published
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)
