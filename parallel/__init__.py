"""Everything that knows of more than one rank: process grid, DeepSpeed engine, distributed checkpoints."""

import os

# DeepSpeed reads this once, while it is imported, and otherwise reports every default it takes.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
