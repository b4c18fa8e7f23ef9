"""How often a model's first choice is right: for tasks whose targets can be known, where a loss says less."""

from collections.abc import Iterable

import torch

from data.loader import Batch
from data.synthetic import NO_TARGET
from models.lm import LM


@torch.no_grad()
def accuracy(model: LM, batches: Iterable[Batch]) -> float:
    """The share of targets that get the highest logit.

    Forms all logits of a batch, so it is meant for small vocabularies. Raises ValueError if there is no target.
    """
    device = model.embed.weight.device
    right = count = 0
    for batch in batches:
        input_ids, labels, positions = (tensor.to(device) for tensor in batch)
        logits, _ = model(input_ids, positions)
        asked = labels != NO_TARGET
        right += int((logits.argmax(-1) == labels)[asked].sum())
        count += int(asked.sum())
    if count == 0:
        raise ValueError("accuracy: the rows have no target token; give rows that ask for something")
    return right / count
