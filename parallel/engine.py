"""One optimizer step on all ranks, on DeepSpeed.

The loss is the mean over all valid targets of the global batch, exactly, whatever the split into ranks and
microbatches: the targets are counted over all ranks before the first backward pass, and each microbatch contributes
its sum divided by that count. DeepSpeed averages gradients over the data axis, so the axis' size is multiplied back in.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from torch import Tensor, nn

from models.lm import LM
from parallel.axes import Axis
from parallel.collectives import all_gather, all_reduce
from parallel.config import ParallelConfig, deepspeed_config
from parallel.grid import Grid
from parallel.partition import Partition
from parallel.state import TrainingState
from parallel.tensor import counts, is_cut
from training.config import OptimizerConfig, Precision
from training.optimizer import parameter_groups

NO_TARGET = -100
"""The label of a token that is not followed by a target."""


class Batch(Protocol):
    """Rows of one rank, int64 `[B, T]` each."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...


class StepResult(NamedTuple):
    """What one optimizer step measured over the global batch.

    Attributes:
        loss: mean negative log likelihood over all valid targets, in nats; 0 if there is none.
        z_loss: mean squared log normaliser over the same targets, before its weight.
        grad_norm: L2 norm of the whole gradient before clipping. Not finite: the gradient was not either, and weights
            and moments were left as they were.
        tokens: valid targets.
        stop: whether any rank passed `stop` to the step.
    """

    loss: float
    z_loss: float
    grad_norm: float
    tokens: int
    stop: bool


class Engine:
    """Trains a model: `step` is forward, backward, reduction, clipping and update.

    Args:
        model: called as `model(input_ids, positions, labels) -> (nll [B, T], log_z [B, T])` on this rank's slice of the
            rows; its weights must be equal on all ranks that hold the same. Moved to the grid's device.
        grid: the processes.
        parallel: how state is split over them.
        optimizer: AdamW's settings; the learning rate comes with each step instead.
        precision: `fp32`, or `bf16`: matrix products in bf16, parameters, gradients and their reduction in fp32.
        z_loss: weight of the mean squared log normaliser in the objective.
        micro_batch_size: rows of a microbatch.
        num_microbatches: microbatches of a step on each rank.
        partition: how the model is cut over tensor ranks; None where every rank holds all of it.

    Attributes:
        module: the model.
        state: weights, moments and step count, for checkpoints.

    Raises:
        ValueError: an unknown precision, `parallel.engine` entries that DeepSpeed refuses, or weights that differ
            between ranks.
    """

    def __init__(
        self,
        model: LM,
        *,
        grid: Grid,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        precision: Precision,
        z_loss: float,
        micro_batch_size: int,
        num_microbatches: int,
        partition: Partition | None = None,
    ) -> None:
        self.grid = grid
        self.parallel = parallel
        self.precision = precision
        self.z_loss = z_loss
        self.num_microbatches = num_microbatches
        config = deepspeed_config(
            parallel,
            clip_norm=optimizer.clip_norm,
            precision=precision,
            micro_batch_size=micro_batch_size,
            num_microbatches=num_microbatches,
        )
        _require_valid(config, parallel)
        self.module = model.to(grid.device)
        _require_equal_weights(model, grid)
        # Fused: ZeRO hands over one flat tensor, and the unfused update would allocate several more of its size.
        self._adamw = torch.optim.AdamW(
            parameter_groups(model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=config, mpu=ModelParallelUnit(grid)
        )
        self._clip_norm = optimizer.clip_norm or float("inf")
        self.state = TrainingState(model, self._adamw, self._deepspeed.optimizer, partition)

    def step(self, microbatches: Sequence[Batch], lr: float, stop: bool = False) -> StepResult:
        """One optimizer step over the microbatches of all ranks. Collective.

        Args:
            microbatches: this rank's.
            lr: learning rate.
            stop: this rank wants to end the run; all learn it from the result. The step is made in any case.
        """
        if len(microbatches) != self.num_microbatches:
            raise ValueError(f"{len(microbatches)} microbatches; this engine takes {self.num_microbatches} a step")
        batches = [self._to_device(batch) for batch in microbatches]
        tokens = torch.stack([(labels != NO_TARGET).sum() for _, _, labels in batches]).sum()
        counts = torch.stack([tokens, torch.full_like(tokens, stop)])
        dist.all_reduce(counts)
        tokens, stops = counts.unbind()
        tokens = tokens // self.grid.axes["tensor"].size  # which all count the same
        scale = self.grid.axes["replicas"].size / tokens.clamp(min=1)
        for group in self._adamw.param_groups:
            group["lr"] = lr

        sums = torch.zeros(2, dtype=torch.float64, device=self.grid.device)  # of nll and log_z ** 2
        for batch in batches:
            nll, log_z = self._deepspeed(*batch)
            nll_sum, square_sum = nll.sum(), log_z.square().sum()
            self._deepspeed.backward(scale * (nll_sum + self.z_loss * square_sum), scale_wrt_gas=False)
            sums += torch.stack([nll_sum, square_sum]).detach()
            if batch is batches[-1] and self.parallel.zero_stage == 0:
                grad_norm = self._clip()
            self._deepspeed.step()
        if self.parallel.zero_stage > 0:
            grad_norm = self._deepspeed.get_global_grad_norm()

        sums = all_reduce(sums, self.grid.axes["replicas"])
        loss, z_loss = (sums / tokens.clamp(min=1)).tolist()
        return StepResult(loss=loss, z_loss=z_loss, grad_norm=float(grad_norm), tokens=int(tokens), stop=bool(stops))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Negative log likelihood of this rank's rows, fp32 `[B, T]`, 0 where there is no target. Collective."""
        self.module.eval()
        try:
            nll, _ = self._deepspeed(*self._to_device(batch))
        finally:
            self.module.train()
        return torch.cat(all_gather(nll, self.grid.axes["sequence"]).unbind(0), dim=1)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The model's arguments: of the rows, this rank's slice."""
        axis = self.grid.axes["sequence"]
        time = batch.labels.shape[1]
        assert time % axis.size == 0, (time, axis)  # `slicing_problems` refuses it before anything is built
        here = slice(axis.index * time // axis.size, (axis.index + 1) * time // axis.size)
        input_ids, positions, labels = (
            tensor[:, here].to(self.grid.device, non_blocking=True)
            for tensor in (batch.input_ids, batch.positions, batch.labels)
        )
        return input_ids, positions, labels

    def _clip(self) -> Tensor:
        """Norm of the reduced gradients before they are clipped: without ZeRO, DeepSpeed clips but does not tell.

        Gradients that are not finite are dropped, as ZeRO drops them: AdamW passes over parameters without one.
        """
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        axis = self.grid.axes["tensor"]
        parts = [p.grad for p in parameters if p.grad is not None and is_cut(p) and counts(p)]
        whole = [p.grad for p in parameters if p.grad is not None and not is_cut(p)]
        of_parts, of_whole = (nn.utils.get_total_norm(part).square().to(self.grid.device) for part in (parts, whole))
        norm = (all_reduce(of_parts, axis) + of_whole).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        if not norm.isfinite():
            self.module.zero_grad(set_to_none=True)
        return norm


class ModelParallelUnit:
    """The tensor axis, under the names by which DeepSpeed asks for it."""

    def __init__(self, grid: Grid) -> None:
        self._tensor, self._replicas = grid.axes["tensor"], grid.axes["replicas"]

    def get_model_parallel_rank(self) -> int:
        return self._tensor.index

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> Any:
        return self._tensor.group

    def get_data_parallel_rank(self) -> int:
        return self._replicas.index

    def get_data_parallel_world_size(self) -> int:
        return self._replicas.size

    def get_data_parallel_group(self) -> Any:
        return self._replicas.group


def _require_valid(config: dict[str, Any], parallel: ParallelConfig) -> None:
    """Raises ValueError if DeepSpeed cannot read its configuration for what `parallel.engine` adds to it."""
    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
        if not parallel.engine:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"parallel.engine: {parallel.engine}; DeepSpeed refuses it: {type(error).__name__}: {reason}; correct or "
            "remove the key that it names"
        ) from error


def _require_equal_weights(model: nn.Module, grid: Grid) -> None:
    """Raises ValueError if any parameter's bits sum to something else on another rank that holds the same.

    DeepSpeed would overwrite them all with the first rank's, and hide that ranks were built differently.
    """
    different: list[str] = []
    for wanted, axis in (
        (True, grid.axes["replicas"]),
        (False, Axis("world", grid.rank, tuple(range(grid.world_size)))),
    ):
        parameters = {name: p for name, p in model.named_parameters() if is_cut(p) == wanted}
        if not parameters:
            continue
        assert all(p.dtype == torch.float32 for p in parameters.values()), "parameters are fp32 in every precision"
        sums = torch.stack([p.detach().view(torch.int32).sum() for p in parameters.values()])  # int64
        highest, negated_lowest = all_reduce(torch.cat([sums, -sums]), axis, dist.ReduceOp.MAX).chunk(2)
        different += [name for name, equal in zip(parameters, (highest == -negated_lowest).tolist()) if not equal]
    if different:
        raise ValueError(
            f"rank {grid.rank}: initial weights differ between ranks in {len(different)} parameters, first in "
            f"{different[0]}; start all ranks with the same configuration, code and torch version"
        )
