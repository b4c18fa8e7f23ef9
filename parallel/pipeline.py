"""The engine over pipeline stages, on DeepSpeed's PipelineModule and PipelineEngine (1F1B, arXiv 1806.03377).

A stage is one layer to DeepSpeed: what `parallel/stages.py` left of the model. Between stages one floating tensor
travels, the stream, and beside it the positions; the head and the loss are the last stage's. A parameter that several
stages hold is what DeepSpeed calls tied: its gradients are summed over them once a step, it counts once in the norm,
and all of its holders make the same update.
"""

import contextlib
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from models.lm import LM
from ops import Layout
from parallel.collectives import all_gather
from parallel.engine import Batch, Engine
from parallel.grid import Grid
from parallel.partition import Partition
from parallel.stages import Held, Stages
from parallel.traffic import record


def make_engine(model: LM, *, grid: Grid, **settings: Any) -> Engine:
    """The engine for the grid; `settings` are those of `Engine`."""
    kind = PipelinedEngine if grid.axes["pipeline"].size > 1 else Engine
    return kind(model, grid=grid, **settings)


class Stage(nn.Module):
    """A stage's part of the forward pass: (token ids or stream, positions) -> (stream, positions)."""

    def __init__(self, model: LM, grid: Grid, stages: Stages) -> None:
        super().__init__()
        self.model, self.axis = model, grid.axes["pipeline"]
        first, last = stages.bounds[self.axis.index : self.axis.index + 2]
        self.blocks = range(first, last)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, positions = inputs
        if self.axis.index == 0:
            x = self.model.embed(x)
        elif x.requires_grad:
            x.register_hook(partial(record, self.axis, "send", layer=""))
        layout = Layout(positions)
        for i in self.blocks:
            x, _ = self.model.blocks[i](x, layout)
        if self.axis.index < self.axis.size - 1:
            record(self.axis, "send", x, layer="")
            record(self.axis, "send", positions, layer="")
        return x, positions


class Shared(TiedLayerSpec):
    """A parameter that several stages hold, as a layer that passes on what it gets."""

    def __init__(self, name: str, weight: nn.Parameter) -> None:
        super().__init__(name, Held, forward_fn=lambda module, x: x, tied_weight_attr="weight")
        self.weight = weight

    def build(self, log: bool = False) -> Held:
        return Held(self.weight)


class Pipeline(PipelineModule):
    """DeepSpeed's module over the layers of all stages, of which those of the others are never looked at.

    Args:
        stage: this rank's.
        stages: of the model.
        grid: the ranks.
        loss: of the stream and the labels.
    """

    def __init__(self, stage: Stage, stages: Stages, grid: Grid, loss: Any) -> None:
        parameters = dict(stage.model.named_parameters())
        elsewhere = nn.Parameter(torch.empty(0))
        layers: list[Any] = []
        self._bounds = [0]
        for index in range(stages.size):
            shared = [name for name, holders in stages.shared.items() if index in holders]
            # A key is the name of a submodule, in which a dot cannot be.
            layers += [Shared(name.replace(".", "/"), parameters.get(name, elsewhere)) for name in shared]
            layers.append(stage if index == stage.axis.index else nn.Identity())
            self._bounds.append(len(layers))
        topology = PipeModelDataParallelTopology(
            num_pp=stages.size, num_mp=grid.axes["tensor"].size, num_dp=grid.axes["replicas"].size
        )
        # It describes itself on stdout, and copies shared parameters from their first holder to the others.
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            super().__init__(layers, topology=topology, loss_fn=loss)

    def _partition_layers(self, method: str = "") -> None:
        """DeepSpeed offers divisions of its own alone."""
        self.parts = self._bounds
        self._set_bounds(*self.parts[self.stage_id : self.stage_id + 2])


class PipelinedEngine(Engine):
    """As `Engine`, for a stage of the model (`build_model`). Every rank of a pipeline passes the same microbatches."""

    def _initialize(self, config: dict[str, Any], partition: Partition | None) -> Any:
        assert partition is not None, "only `build_model` divides a model into stages"
        assert partition.stages is not None
        self._objective: tuple[Tensor, Tensor] | None = None
        self._found: list[tuple[Tensor, Tensor]] = []
        stage = Stage(self.module, self.grid, partition.stages)
        return deepspeed.initialize(
            model=Pipeline(stage, partition.stages, self.grid, self._loss), optimizer=self._adamw, config=config
        )[0]

    def _loss(self, outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Of one microbatch, in the last stage: its part of the objective. Without one, what the head finds is kept."""
        x, _ = outputs
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            nll, log_z = self.module.head(x, labels)
        if self._objective is None:
            self._found.append((nll, log_z))
            return nll.sum()
        scale, sums = self._objective
        nll_sum, square_sum = nll.sum(), log_z.square().sum()
        sums += torch.stack([nll_sum, square_sum]).detach()
        # DeepSpeed divides by the number of microbatches.
        return self.num_microbatches * scale * (nll_sum + self.z_loss * square_sum)

    def _run(self, batches: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor, sums: Tensor) -> None:
        self._objective = scale, sums
        try:
            self._deepspeed.train_batch(_inputs(batches))
        finally:
            self._objective = None

    def _look_at(self, batch: Batch) -> tuple[Tensor, Tensor]:
        arguments = self._to_device(batch)
        labels = arguments[2]
        self._deepspeed.reset_activation_shape()
        try:
            self._deepspeed.eval_batch(_inputs([arguments]), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        finally:
            self._deepspeed.module.train()
            self._deepspeed.reset_activation_shape()
        axis = self.grid.axes["pipeline"]
        both = (
            torch.stack(self._found.pop()) if self._found else labels.new_empty(2, *labels.shape, dtype=torch.float32)
        )
        dist.broadcast(both, axis.ranks[-1], axis.group)
        nll, other = torch.cat(all_gather(both, self.grid.axes["sequence"]).unbind(0), dim=2)
        return nll, other


def _inputs(batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Any:
    """What the first stage and the last one read of each microbatch."""
    return iter([((input_ids, positions), labels) for input_ids, positions, labels in batches])
