"""What an export will write and hold in memory, from the model's configuration alone."""

from typing import NamedTuple

import torch

from models.config import ModelConfig
from models.hf.formats import Format
from models.hf.verify import GENERATED, ROWS, row_length
from models.hf.weights import WeightsFile, num_bytes, parameter_shapes, plan_files

FP32_BYTES = 4
GB = 10**9


class Plan(NamedTuple):
    """The files of weights in order, and the peak of each phase in bytes, beside what Python and torch take."""

    stored_as: Format
    files: list[WeightsFile]
    writing: int
    comparing: int

    @property
    def peak(self) -> int:
        return max(self.writing, self.comparing)


def plan_export(config: ModelConfig, stored_as: Format, dtype: torch.dtype, max_shard_bytes: int) -> Plan:
    """Nothing as large as a parameter is made: shapes come from the meta device."""
    shapes = parameter_shapes(config)
    tensors = stored_as.tensors(config, shapes)
    files = plan_files(tensors, dtype, max_shard_bytes)
    sizes = {name: FP32_BYTES * torch.Size(shape).numel() for name, shape in shapes.items()}
    held = max(sum(num_bytes(tensor, dtype) for tensor in file.tensors) for file in files)
    row = FP32_BYTES * row_length(config.vocab_size) * config.vocab_size
    kept = (ROWS + 1) * row + FP32_BYTES * GENERATED * config.vocab_size
    working = 2 * row  # logits in the making
    return Plan(stored_as, files, held + max(sizes.values()), sum(sizes.values()) + kept + working)


def plan_text(plan: Plan, config: ModelConfig, dtype: str) -> str:
    """The plan as a table."""
    widest = max(len(file.name) for file in plan.files)
    lines = [f"{config.num_params():,} parameters as {plan.stored_as.architecture} ({plan.stored_as.name}) in {dtype}"]
    lines += [
        f"  {file.name:{widest}}  {file.num_bytes / GB:8.3f} GB  {len(file.tensors):5} tensors" for file in plan.files
    ]
    total = sum(file.num_bytes for file in plan.files)
    lines.append(f"  {'all':{widest}}  {total / GB:8.3f} GB, and configuration, tokenizer and card")
    copy = FP32_BYTES * config.num_params()
    lines.append(
        f"peak memory {plan.peak / GB:.2f} GB beside Python and torch: writing takes {plan.writing / GB:.2f} GB, "
        f"comparing {plan.comparing / GB:.2f} GB, of which one fp32 copy of the weights {copy / GB:.2f} GB"
    )
    return "\n".join(lines)
