"""Everything that knows of more than one rank: process grid, DeepSpeed engine, distributed checkpoints."""

import os

import torch

# DeepSpeed reads both once, while it is imported, and otherwise reports every default it takes and the device it chose.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
