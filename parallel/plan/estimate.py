"""Memory, communication and time of one arrangement of ranks."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from parallel.config import REDUCE_BUCKET_SIZE, ParallelConfig
from parallel.plan.blocks import ATTENTION_SHARE, Blocks
from parallel.plan.gathered import MAX_REUSE_DISTANCE, PREFETCHED
from parallel.plan.hardware import Hardware
from parallel.plan.resent import resent
from parallel.plan.state import PERSISTENT, WORD, StateBytes
from parallel.recompute import checkpointed_blocks
from parallel.stages import Stages, bubble
from parallel.traffic import Key, Volume
from parallel.volume import Split, traffic_of

CORRECTIONS = 2
"""Of a nonlinear recurrence over sequence ranks, taken where a run has not told."""

KINDS = ("weights", "gradients", "optimizer", "activations", "state", "logits", "buffers")

UPDATE_BYTES = 32
"""Moved for each entry that AdamW updates: gradient, weight and moments read, three of them written, and a copy."""

COPY_FACTOR = 3
"""Times the bytes of a bf16 copy that making it from fp32 moves."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How a run is spread.

    Attributes:
        gpus: all ranks.
        parallel: the axes, ZeRO's stage and what is checkpointed.
        rows: of a microbatch.
        batch_size: rows of a step.
    """

    gpus: int
    parallel: ParallelConfig
    rows: int
    batch_size: int

    @property
    def data(self) -> int:
        return self.gpus // (self.parallel.pipeline * self.parallel.sequence * self.parallel.tensor)

    @property
    def replicas(self) -> int:
        return self.data * self.parallel.sequence

    @property
    def num_microbatches(self) -> int:
        return self.batch_size // (self.rows * self.data)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step of the slowest stage: `compute` and `exchange` of its microbatches, what it waits in the
    pipeline's `bubble`, what reducing gradients and gathering weights take (`reduce`), and the `update`, new copies of
    weights included."""

    compute: float
    exchange: float
    bubble: float
    reduce: float
    update: float

    @property
    def step(self) -> float:
        return self.compute + self.exchange + self.bubble + self.reduce + self.update


class Estimate:
    """What `arrangement` takes. Everything is computed when it is asked for.

    Args:
        blocks: of the model.
        stages: as many as the arrangement has.
    """

    def __init__(self, arrangement: Arrangement, blocks: Blocks, stages: Stages, hardware: Hardware) -> None:
        self.arrangement, self.blocks, self.stages, self.hardware = arrangement, blocks, stages, hardware
        split = arrangement.parallel
        self.sharded_norms = blocks.sharded_norms and split.tensor > 1
        self.split = Split(
            rows=arrangement.rows,
            time=blocks.sequence_length,
            sequence=split.sequence,
            tensor=split.tensor,
            index=split.sequence // 2,
            narrow=2 if blocks.bf16 else 4,
            sharded_norms=self.sharded_norms,
            corrections=min(CORRECTIONS, max(1, split.sequence - 1)),
        )
        self.checkpointed = checkpointed_blocks(blocks.config.layers, split)
        self.keeps_copies = split.zero_stage < 3  # of weights, for all passes of a step (`Engine`)
        zero = self._zero = split.engine.get("zero_optimization", {})
        self._bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE))
        self._persistent = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))

    @property
    def stream_bytes(self) -> int:
        """Of the fp32 stream of one microbatch."""
        parts = self.split.tensor if self.sharded_norms else 1
        return self.split.tokens * self.blocks.config.width * 4 // parts

    def state(self, stage: int, index: int = 0) -> StateBytes:
        """What rank `index` of those that share the state of `stage` holds of its parameters."""
        split, zero = self.arrangement.parallel, self._zero
        return self.blocks.state(
            self.stages.names[stage],
            split.tensor,
            zero=split.zero_stage,
            ranks=self.arrangement.replicas,
            index=index,
            accumulates=self.arrangement.num_microbatches > 1,
            bucket=self._bucket * (2 if zero.get("overlap_comm") else 1),
            persistent=self._persistent,
            offloads=frozenset(
                what for what, key in (("optimizer", "offload_optimizer"), ("weights", "offload_param")) if key in zero
            ),
        )

    def memory(self, stage: int) -> dict[str, float]:
        """Bytes of a rank of `stage` by kind, when they are most: in the last backward pass, or at the update."""
        held, split = self.state(stage), self.arrangement.parallel
        in_flight = min(split.pipeline - stage, self.arrangement.num_microbatches)
        kept, working, exchanged = self._activations(stage)
        logits = 0.0
        if stage == self.stages.size - 1:
            head = self.blocks.cost("head", self.split)
            logits = self.blocks.logits_bytes(self.split.tokens, split.tensor)
            # Its own backward pass is over when the blocks' begins.
            if head.peak + logits > working:
                working = head.peak
            else:
                logits = 0.0
        ids = 3 * 8 * self.split.tokens * self.arrangement.num_microbatches
        buffers = held.buffers + ids
        if split.pipeline > 1:  # what came and what goes, and their gradients
            buffers += (in_flight + 1) * 2 * self.stream_bytes + 2 * self.stream_bytes
        gradients, activations, state = float(held.gradients), in_flight * kept + working, in_flight * exchanged
        if held.reduced > gradients + activations + state + logits:
            gradients, activations, state, logits = held.reduced, 0.0, 0.0, 0.0
        weights = held.weights + self._copies(stage)
        sizes = (weights, gradients, held.optimizer, activations, state, logits, buffers)
        return dict(zip(KINDS, map(float, sizes), strict=True))

    def _copies(self, stage: int) -> float:
        """Bytes of the copies of a stage's weights that last for a step."""
        if not self.keeps_copies:
            return 0.0
        kinds = self.blocks.counts(*self.stages.bounds[stage : stage + 2])
        return sum(number * self.blocks.cost(kind, self.split).copies for kind, number in kinds.items())

    def _activations(self, stage: int) -> tuple[float, float, float]:
        """Of one microbatch: what is kept to the backward pass, the most that is alive besides within it, and what is
        kept of other slices. Copies of weights are among it where they do not last for a step."""
        kept = working = exchanged = 0.0
        first, after = self.stages.bounds[stage : stage + 2]
        for twice in (False, True):
            layers = [i for i in range(first, after) if (i in self.checkpointed) == twice]
            for kind in dict.fromkeys(self.blocks.config.layers[i] for i in layers):
                number = sum(self.blocks.config.layers[i] == kind for i in layers)
                cost = self.blocks.cost(kind, self.split)
                more = self.blocks.exchanged(kind, self.split)
                copies = 0.0 if self.keeps_copies else cost.copies
                kept += number * (self.stream_bytes if twice else cost.kept + copies)
                exchanged += 0.0 if twice else number * more
                working = max(working, cost.peak + copies + more if twice else cost.peak - cost.kept)
        return kept, working, exchanged

    @cached_property
    def largest(self) -> tuple[int, dict[str, float]]:
        """The stage that takes most memory, and what it takes."""
        return max(
            ((stage, self.memory(stage)) for stage in range(self.stages.size)), key=lambda found: sum(found[1].values())
        )

    @property
    def bytes(self) -> float:
        """Of a GPU of that stage."""
        return sum(self.largest[1].values())

    @property
    def host_bytes(self) -> float:
        """Of one rank, in the machine's memory: the copy of a checkpoint under way, with one whole tensor, and what is
        offloaded."""
        entries = self.blocks.entries
        of_stage = max(sum(entries[name] for name in held) for held in self.stages.names)
        copy = 12 * of_stage / (self.arrangement.replicas * self.split.tensor)
        return copy + 4 * max(entries.values()) + max(self.state(stage).host for stage in range(self.stages.size))

    def passes(self, stage: int) -> tuple[float, float]:
        """Seconds that one microbatch computes in `stage`, forward and backward, what runs twice included backward."""
        machine, split = self.hardware, self.split
        forward = backward = 0.0
        first, after = self.stages.bounds[stage : stage + 2]
        for kind, number in self.blocks.counts(first, after).items():
            ahead, back = self._seconds(kind)
            again = sum(self.blocks.config.layers[i] == kind for i in self.checkpointed if first <= i < after)
            forward += number * ahead
            backward += number * back + again * ahead
        if stage == self.stages.size - 1:
            entries = -(-self.blocks.config.vocab_size // split.tensor)
            product = 2.0 * split.tokens * self.blocks.config.width * entries / self._products
            passes = split.tokens * entries / machine.bandwidth
            forward += product + 8.0 * passes
            backward += 3.0 * product + 18.0 * passes
        return forward, backward

    @property
    def _products(self) -> float:
        return self.hardware.products if self.blocks.bf16 else self.hardware.wide_products

    def _seconds(self, kind: str) -> tuple[float, float]:
        machine, cost, rate = self.hardware, self.blocks.cost(kind, self.split), self._products
        pairs = self.split.tokens * self.blocks.attention_flops(kind, self.split.tensor, self.blocks.sequence_length)
        more = 0.0  # the summary of a slice is one more pass of the recurrence, and another with each correction
        if self.split.sequence > 1:
            more = cost.core_bytes * (1 + (self.split.corrections if kind in self.blocks.nonlinear else 0))
        moved = cost.forward_bytes + more - (COPY_FACTOR * cost.copies if self.keeps_copies else 0.0)
        ahead = cost.forward_flops / rate + moved / machine.bandwidth
        back = cost.backward_flops / rate + (cost.backward_bytes + more) / machine.bandwidth
        ahead += pairs / (rate * ATTENTION_SHARE[0])
        back += 2.5 * pairs / (rate * ATTENTION_SHARE[1])
        return max(ahead, cost.forward_calls * machine.launch), max(back, cost.backward_calls * machine.launch)

    def sent(self, stage: int, index: int | None = None) -> dict[Key, Volume]:
        """Calls and bytes of a microbatch, of slice `index` (by default one between others), by the counter's keys."""
        split = self.split if index is None else dataclasses.replace(self.split, index=index)
        total = dict(traffic_of(self.blocks.whole, split, self.stages, stage))
        first, after = self.stages.bounds[stage : stage + 2]
        here = frozenset(i for i in self.checkpointed if first <= i < after)
        for key, volume in resent(self.blocks.whole, split, here).items() if here else ():
            total[key] = total.get(key, Volume(0, 0)).plus(volume)
        return total

    def reduced(self, stage: int) -> dict[tuple[str, str], Volume]:
        """What DeepSpeed sends in a step besides, by axis and operation: gradients, and the weights that ZeRO cuts.
        Calls are the fewest that its buckets allow."""
        split, count = self.arrangement.parallel, self.arrangement.num_microbatches
        held, ranks, zero = self.state(stage), self.arrangement.replicas, self._zero
        found: dict[tuple[str, str], Volume] = {}
        buckets = -(-held.entries // max(1, self._bucket))
        if ranks > 1 and split.zero_stage < 3:
            often = count if split.zero_stage == 2 else 1
            found["data", "all_reduce"] = Volume(often * buckets, often * WORD * held.entries)
            if split.zero_stage:
                found["data", "all_gather"] = Volume(2, WORD * held.share)
        if ranks > 1 and split.zero_stage == 3:
            a_pass, once = self.blocks.handed_out(
                split.tensor,
                ranks,
                self._persistent,
                int(zero.get("stage3_max_reuse_distance", MAX_REUSE_DISTANCE)),
            )
            ahead = int(zero.get("stage3_prefetch_bucket_size", PREFETCHED))
            fetches = -(-a_pass * ranks // ahead) if ahead else 2 * len(self.blocks.config.layers)
            found["data", "all_gather"] = Volume(count * fetches + (once > 0), WORD * (count * a_pass + once))
            found["data", "reduce_scatter"] = Volume(count * buckets, count * WORD * held.share * ranks)
        if tied := self.blocks.tied(self.stages, stage, split.tensor):
            found["pipeline", "all_reduce"] = Volume(1, WORD * tied)
        return found

    @cached_property
    def slowest(self) -> int:
        """The stage whose microbatches take longest."""
        return max(range(self.stages.size), key=lambda stage: sum(self.passes(stage)))

    @cached_property
    def volumes(self) -> dict[tuple[str, str], Volume]:
        """Of a step of the slowest stage, by axis and operation."""
        return self.step_volumes(self.slowest)

    def step_volumes(self, stage: int, index: int | None = None) -> dict[tuple[str, str], Volume]:
        """Calls and bytes of a step of `stage`, of slice `index` as in `sent`, by axis and operation."""
        total, count = self.reduced(stage), self.arrangement.num_microbatches
        for key, volume in self.sent(stage, index).items():
            place = (key.axis, key.operation)
            total[place] = total.get(place, Volume(0, 0)).plus(Volume(count * volume.calls, count * volume.bytes))
        return total

    @cached_property
    def times(self) -> Times:
        count, split = self.arrangement.num_microbatches, self.arrangement.parallel
        reduced = self.reduced(self.slowest)
        exchange = self._wire(
            (*place, volume)
            for place, volume in self.blocks.sums(
                self.split, self.stages.bounds, self.slowest, self.checkpointed
            ).items()
        )
        work = sum(self.passes(self.slowest))
        waits = bubble(count, split.pipeline)
        moved = UPDATE_BYTES * self.state(self.slowest).share + COPY_FACTOR * self._copies(self.slowest)
        return Times(
            compute=count * work,
            exchange=count * exchange,
            bubble=count * (work + exchange) * waits / (1 - waits),
            reduce=self._wire((axis, operation, volume) for (axis, operation), volume in reduced.items()),
            update=moved / self.hardware.bandwidth,
        )

    def _wire(self, sent: Iterable[tuple[str, str, Volume]]) -> float:
        """Seconds, one call after the other."""
        split = self.arrangement.parallel
        sizes = {"tensor": split.tensor, "sequence": split.sequence, "data": self.arrangement.replicas}
        sizes["pipeline"] = split.pipeline
        # How far apart an axis' first and last ranks are: gradients are reduced over data and sequence ranks together.
        reach = {"tensor": split.tensor, "sequence": split.tensor * split.sequence, "pipeline": self.arrangement.gpus}
        reach["data"] = self.arrangement.gpus // split.pipeline
        seconds = 0.0
        for axis, operation, volume in sent:
            ranks, within = sizes[axis], reach[axis] <= self.hardware.machine
            share = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1.0, "send": 1.0}
            part = share.get(operation, (ranks - 1) / ranks)
            speed = self.hardware.near if within else self.hardware.far
            seconds += part * volume.bytes / speed + volume.calls * self.hardware.latency[0 if within else 1]
        return seconds

    @property
    def mfu(self) -> float:
        """Useful FLOPs, three times a forward pass, over what the GPUs could do."""
        useful = 3 * self.blocks.flops_per_token * self.arrangement.batch_size * self.blocks.sequence_length
        return useful / (self.times.step * self.arrangement.gpus * self.hardware.peak)
