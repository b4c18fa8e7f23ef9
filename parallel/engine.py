"""One optimizer step on all ranks, on DeepSpeed.

The loss is the mean over all valid targets of the global batch, exactly, whatever the split into ranks and
microbatches: the targets are counted over all ranks before the first backward pass, and each microbatch contributes
its sum divided by that count. DeepSpeed averages gradients over the data axis, so the axis' size is multiplied back in.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.lm import LM
from parallel.admission import require_equal_weights, require_valid
from parallel.collectives import all_gather, all_reduce
from parallel.config import ParallelConfig, deepspeed_config
from parallel.gate import UpdateGate
from parallel.grid import Grid
from parallel.partition import Partition
from parallel.scatter import scatter_all
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
        grad_norm: L2 norm of the whole gradient before clipping. Not finite: the gradient was not either.
        tokens: valid targets.
        stop: whether any rank passed `stop` to the step.
        accepted: whether the update was made; otherwise weights and moments were left as they were.
    """

    loss: float
    z_loss: float
    grad_norm: float
    tokens: int
    stop: bool
    accepted: bool


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
        require_valid(config, parallel)
        self.module = model.to(grid.device)
        if parallel.zero_stage == 3:
            scatter_all(model, grid, parallel)
        require_equal_weights(model, grid)
        # Fused: ZeRO hands over one flat tensor, and the unfused update would allocate several more of its size.
        self._adamw = torch.optim.AdamW(
            parameter_groups(model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._gate = UpdateGate(self._adamw)
        self._deepspeed = self._initialize(config, partition)
        self._clip_norm = optimizer.clip_norm or float("inf")
        stages, index = partition.stages if partition is not None else None, grid.axes["pipeline"].index
        self._owned_before = stages.owned_before(index) if stages is not None else frozenset()
        self.state = TrainingState(model, self._adamw, self._deepspeed.optimizer, partition, self._owned_before)

    def _initialize(self, config: dict[str, Any], partition: Partition | None) -> Any:
        """DeepSpeed's engine around the model."""
        unit = ModelParallelUnit(self.grid)
        return deepspeed.initialize(model=self.module, optimizer=self._adamw, config=config, mpu=unit)[0]

    def step(
        self,
        microbatches: Sequence[Batch],
        lr: float,
        stop: bool = False,
        accept: Callable[[float, float], bool] = lambda loss, grad_norm: True,
    ) -> StepResult:
        """One optimizer step over the microbatches of all ranks. Collective.

        Args:
            microbatches: this rank's.
            lr: learning rate.
            stop: this rank wants to end the run; all learn it from the result. The step is made in any case.
            accept: asked with loss and gradient norm, both finite, before the update, which is made if all ranks
                accept. Where one of the two is not finite no update is made and nobody asked.
        """
        if len(microbatches) != self.num_microbatches:
            raise ValueError(f"{len(microbatches)} microbatches; this engine takes {self.num_microbatches} a step")
        batches = [self._to_device(batch) for batch in microbatches]
        tokens = torch.stack([(labels != NO_TARGET).sum() for _, _, labels in batches]).sum()
        counts = torch.stack([tokens, torch.full_like(tokens, stop)])
        dist.all_reduce(counts)
        tokens, stops = counts.unbind()
        tokens = tokens // (self.grid.axes["tensor"].size * self.grid.axes["pipeline"].size)  # who count the same
        scale = self.grid.axes["replicas"].size / tokens.clamp(min=1)
        for group in self._adamw.param_groups:
            group["lr"] = lr

        sums = torch.zeros(2, dtype=torch.float64, device=self.grid.device)  # of nll and log_z ** 2
        measured: list[tuple[float, float, float]] = []

        def admit() -> bool:
            measured.append(self._measure(sums, tokens))
            loss, _, norm = measured[0]
            return self._all(math.isfinite(loss) and math.isfinite(norm) and accept(loss, norm))

        self._gate.expect(admit)
        with self._narrow_weights():
            self._run(batches, scale, sums)
        # DeepSpeed drops a gradient whose norm is not finite without asking.
        loss, z_loss, norm = measured[0] if measured else self._measure(sums, tokens)
        return StepResult(loss, z_loss, norm, int(tokens), stop=bool(stops), accepted=self._gate.passed)

    @property
    def called(self) -> nn.Module:
        """What is called once a microbatch on this rank: the model, or a pipeline stage of it."""
        return self._deepspeed.module

    def _narrow_weights(self) -> AbstractContextManager[Any]:
        """Inside, autocast makes one bf16 copy of each weight and keeps it for all passes; by itself it makes copies
        anew for every microbatch, which each hold theirs to the backward pass. Under ZeRO 3 it keeps none: copies of
        everything are what that divides.

        Autocast drops what it keeps where its outermost context ends. This one is off, and DeepSpeed's lie inside.
        """
        keeps = self.parallel.zero_stage < 3
        return torch.autocast(self.grid.device.type, torch.bfloat16, enabled=False, cache_enabled=keeps)

    def _run(self, batches: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor, sums: Tensor) -> None:
        """Forward and backward of all microbatches, whose objective is the sum over targets times `scale`, and the
        update.

        Args:
            sums: that of nll and of log_z ** 2 over this rank's targets are added to it.
        """
        for batch in batches:
            nll, log_z = self._deepspeed(*batch)
            nll_sum, square_sum = nll.sum(), log_z.square().sum()
            self._deepspeed.backward(scale * (nll_sum + self.z_loss * square_sum), scale_wrt_gas=False)
            sums += torch.stack([nll_sum, square_sum]).detach()
            self._deepspeed.step()

    def _measure(self, sums: Tensor, tokens: Tensor) -> tuple[float, float, float]:
        """Loss and z-loss of the step from this rank's sums, and the gradient norm. Collective."""
        norm = self._clip() if self.parallel.zero_stage == 0 else self._deepspeed.optimizer._global_grad_norm
        for name in ("replicas", "pipeline"):
            sums = all_reduce(sums, self.grid.axes[name])
        loss, z_loss = (sums / tokens.clamp(min=1)).tolist()
        return loss, z_loss, float(norm)

    def _all(self, answer: bool) -> bool:
        """Whether the answer of every rank is yes. Collective."""
        refusals = torch.tensor(int(not answer), device=self.grid.device)
        dist.all_reduce(refusals)
        return not refusals

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Negative log likelihood of this rank's rows, fp32 `[B, T]`, 0 where there is no target. Collective."""
        return self._look_at(batch)[0]

    @torch.no_grad()
    def judge(self, batch: Batch, among: int | None = None) -> tuple[Tensor, Tensor]:
        """What `evaluate` returns, and the most likely token at each place, a whole number in fp32 `[B, T]`: of all, or
        of those below `among`. Collective."""
        heads: list[Any] = [module for module in self.module.modules() if hasattr(module, "judges")]
        try:
            for head in heads:
                head.judges = sys.maxsize if among is None else among
            return self._look_at(batch)
        finally:
            for head in heads:
                head.judges = None

    def _look_at(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both results of the head over this rank's whole rows, without a step."""
        self.module.eval()
        try:
            with self._narrow_weights():
                found = self._deepspeed(*self._to_device(batch))
        finally:
            self.module.train()
        axis = self.grid.axes["sequence"]
        nll, other = (torch.cat(all_gather(part, axis).unbind(0), dim=1) for part in found)
        return nll, other

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
        """Norm of the reduced gradients before they are clipped: without ZeRO, DeepSpeed clips but does not tell, and
        leaves out what other pipeline stages hold. Collective."""
        found = {name: p for name, p in self.module.named_parameters() if p.grad is not None}
        once = [(p, p.grad) for name, p in found.items() if name not in self._owned_before and p.grad is not None]
        parts = [grad for p, grad in once if is_cut(p) and counts(p)]
        whole = [grad for p, grad in once if not is_cut(p)]
        of_parts, of_whole = (nn.utils.get_total_norm(part).square().to(self.grid.device) for part in (parts, whole))
        of_stage = all_reduce(of_parts, self.grid.axes["tensor"]) + of_whole
        norm = all_reduce(of_stage, self.grid.axes["pipeline"]).sqrt()
        nn.utils.clip_grads_with_norm_(found.values(), self._clip_norm, norm)
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
