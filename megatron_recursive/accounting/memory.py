"""Theoretical memory of a training rank: weights and optimizer held once, activations by recorded pass.

What a layer keeps for its backward follows Korthikanti et al. (https://arxiv.org/abs/2205.05198, table 2, attention
without a score matrix), for any width of heads, groups and MLP. Vectors of a few numbers per token (norm statistics,
log-sum-exp) and rotary tables are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_recursive.accounting.params import ModelShape, tensor_parallel_parameters
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plan.added_parameters import MOVING
from megatron_recursive.plan.trips import trips_of


@dataclass(frozen=True)
class Recording:
    """What decides how much a pass keeps. Sizes are in bytes an element.

    Attributes:
        micro_batch: samples of a micro-batch.
        element: of weights and activations, 2 or 4.
        tensor_parallel, sequence_parallel: tensor-parallel size; whether its ranks also share out the sequence.
        rotary: queries and keys are rotated, which copies them.
        dropout_mask: a kept mask of hidden dropout; 0 without dropout.
        splits_norm: the norm is computed by several operations, which keep the normalized input too.
        splits_activation: a gated MLP's activation is computed by several operations.
        recompute_layers: layers that are replayed together (``--recompute-method uniform``); 0 replays none.
        recompute_block: layers of a stage that are replayed one by one, the others not (``--recompute-method block``).
        recompute_mlp: the MLP is replayed (``--recompute-modules mlp``).
        recompute_passes: a pass keeps its input and is replayed.
    """

    micro_batch: int
    element: int = 2
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    rotary: bool = True
    dropout_mask: int = 0
    splits_norm: bool = False
    splits_activation: bool = False
    recompute_layers: int = 0
    recompute_block: int = 0
    recompute_mlp: bool = False
    recompute_passes: bool = False

    @property
    def replicas(self) -> int:
        """Over how many ranks a tensor [S, B, H] between the layers is spread."""
        return self.tensor_parallel if self.sequence_parallel else 1


@dataclass(frozen=True)
class StateBytes:
    """Bytes a parameter: the parameter itself, its gradient, and the optimizer's states of it.

    ``optimizer_shards`` is the data-parallel size under a distributed optimizer.
    """

    parameter: int = 2
    gradient: int = 4
    optimizer: int = 12
    optimizer_shards: int = 1

    @property
    def total(self) -> float:
        return self.parameter + self.gradient + self.optimizer / self.optimizer_shards


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of a pipeline stage at the peak of a step.

    Attributes:
        weights: parameters, gradients and optimizer states; the parameters of a teacher.
        decoder: what the recorded passes keep.
        replay: of one pass (or of some layers) while its backward recomputes it.
        heads: logits and halting head, on the last stage; free again before a replay begins.
        states: those of the micro-batches that stage 0 holds, with their gradients.
    """

    weights: float
    decoder: float
    replay: float
    heads: float
    states: float

    @property
    def activations(self) -> float:
        return self.decoder + max(self.replay, self.heads) + self.states

    @property
    def total(self) -> float:
        return self.weights + self.activations

    @property
    def parts(self) -> dict[str, float]:
        """As commands tell them."""
        return {"weights": self.weights, "passes": self.decoder + self.states, "head": max(self.heads, self.replay),
                "total": self.total}  # fmt: skip


def hidden_bytes(shape: ModelShape, recording: Recording) -> float:
    """One hidden tensor [S, B, H] of a micro-batch."""
    tokens = shape.seq_length * recording.micro_batch
    return tokens * shape.hidden_size * recording.element / recording.replicas


def layer_bytes(shape: ModelShape, recording: Recording) -> float:
    """What one layer keeps of one micro-batch, without recomputation of whole layers."""
    hidden = shape.hidden_size
    # The inputs of all norms; what the norms in front of attention and MLP give. Sums keep nothing.
    between = (shape.norms_per_layer + 2) * hidden
    if recording.splits_norm:
        between += shape.norms_per_layer * hidden
    within = 2 * shape.query_size + shape.key_value_size  # queries, keys, values; attention's result
    queries_and_keys = shape.query_size + shape.key_value_size // 2
    if recording.rotary:
        within += queries_and_keys
    if shape.qk_norm and recording.splits_norm:
        within += queries_and_keys
    if shape.attention_gate:  # its sigmoid in fp32, and the product
        within += shape.query_size * (1 + 4 // recording.element)
    if not recording.recompute_mlp:
        within += _mlp_elements(shape, recording)
    elements = between / recording.replicas + within / recording.tensor_parallel
    masks = 2 * hidden * recording.dropout_mask / recording.replicas
    return shape.seq_length * recording.micro_batch * (elements * recording.element + masks)


def _mlp_elements(shape: ModelShape, recording: Recording) -> int:
    """What the MLP of a layer keeps of one token, without its input: what goes into its activation and out of it."""
    ffn = shape.ffn_hidden_size
    if not shape.gated_linear_unit:
        return 2 * ffn
    return (5 if recording.splits_activation else 3) * ffn


def pass_bytes(
    shape: ModelShape, recording: Recording, layers: int, *, closing_norm: bool = True
) -> tuple[float, float]:
    """(kept until the backward of a pass, held besides while that backward replays) of one micro-batch.

    Args:
        layers: of this pipeline stage. closing_norm: whether the pass ends with the final norm here.
    """
    hidden, layer = hidden_bytes(shape, recording), layer_bytes(shape, recording)
    norm = hidden * (2 if recording.splits_norm else 1) if closing_norm else 0.0
    kept, replay = layers * layer + norm, 0.0
    if recording.recompute_mlp:
        tokens = shape.seq_length * recording.micro_batch
        replay = tokens * _mlp_elements(shape, recording) * recording.element / recording.tensor_parallel
    if not layers:
        return norm, 0.0
    if recording.recompute_layers:
        chunk = min(recording.recompute_layers, layers)
        kept, replay = -(-layers // chunk) * hidden + norm, chunk * layer + replay
    elif recording.recompute_block:
        replayed = min(recording.recompute_block, layers)
        kept, replay = replayed * hidden + (layers - replayed) * layer + norm, layer + replay
    if recording.recompute_passes:
        return hidden, kept + replay
    return kept, replay


def head_bytes(shape: ModelShape, plan: RecursionPlan, recording: Recording) -> tuple[float, float]:
    """(kept by the heads until the backward of the last pass, kept of each micro-batch that waits for its last pass).

    The cross-entropy keeps fp32 probabilities; in other dtypes the logits that it last reads are there beside them. The
    halting head keeps the state that it read, at every block end that teaches it; of the last one the language-model
    head keeps the same tensor, as it does at an earlier block that is supervised, whose logits are computed again.
    """
    tokens, hidden = shape.seq_length * recording.micro_batch, hidden_bytes(shape, recording)
    norm = hidden * (2 if recording.splits_norm else 1) if plan.norms_before_heads else 0.0
    replayed = sum(map(plan.is_replayed, plan.passes))
    halting = sum(plan.is_projected(p) and not p.supervised_weight for p in plan.passes)
    waiting = halting * hidden + replayed * (hidden + norm)
    if plan.trains_heads_only:
        return 0.0, waiting
    element = 4 + recording.element * (recording.element < 4)
    return tokens * shape.vocab_size * element / recording.tensor_parallel + hidden + norm, waiting


def cache_bytes_per_token(shape: ModelShape, plan: RecursionPlan, element: int) -> int:
    """Keys and values of a token at inference, whose cache has a layer for every layer that is applied."""
    return plan.unrolled_layers(shape.num_layers) * shape.key_value_size * element


def states_held(stages: int, in_flight: int, window: int = 0) -> int:
    """Hidden tensors that the states of all micro-batches take on the first stage.

    Embedding, output and latent; in the ring two of them with a gradient each while a micro-batch is under way.
    """
    return 3 * in_flight if stages == 1 else 4 * in_flight + 3 * max(window - in_flight, 0)


def stage_memory(
    shape: ModelShape,
    plan: RecursionPlan,
    recording: Recording,
    state: StateBytes,
    *,
    layers_per_stage: Sequence[int] = (),
    most_held: Callable[[int, Sequence[float]], float] | None = None,
    in_flight: int = 1,
    window: int = 0,
    teacher: int | None = None,
) -> list[StageMemory]:
    """The memory of every pipeline stage.

    Args:
        layers_per_stage: all layers on one stage if left out.
        most_held: of a stage, and of what each trip keeps there, the most at once; all of it if left out.
        in_flight: micro-batches that are under way at once. window: those of a window of two phases, all of which
            wait between the phases; 0 in one phase.
        teacher: parameters of one that the model is distilled from, which the last stage holds beside what the loss
            keeps; 0 where it is read from disk.
    """
    split = tuple(layers_per_stage) or (shape.num_layers,)
    counts, trips = plan.layers_by_pass(split), trips_of(plan, split)
    sizes = tensor_parallel_parameters(shape, plan, recording.tensor_parallel, split)
    hidden, (head, waiting) = hidden_bytes(shape, recording), head_bytes(shape, plan, recording)
    if len(split) > 1 and len(plan.block_ends) > 1:
        waiting = max(waiting, hidden)  # the state behind the last block, whose change the next one tells
    if teacher is not None:  # fp32 differences of probabilities
        head += 4 * shape.seq_length * recording.micro_batch * shape.vocab_size / recording.tensor_parallel
    stages = []
    for stage in range(len(split)):
        is_first, is_last = stage == 0, stage == len(split) - 1
        # A norm that also stands before the heads is not replayed.
        unplayed = recording.recompute_passes and is_last and plan.norms_before_heads
        by_trip, most = [0.0] * len(trips), 0.0
        for trip in trips:
            for p in (p for p in trip.passes if p.grad and (p is trip.around or counts[p.index][stage])):
                closes = is_last and plan.closes(p)
                kept, replay = pass_bytes(shape, recording, counts[p.index][stage], closing_norm=closes)
                # A linear map keeps what it read, and a decay too.
                beside = 2 * (is_first and p.combine != "sum") + (unplayed and closes)
                beside += MOVING[p.move].kept if is_first and p.move in MOVING else 0
                by_trip[trip.index] += kept + hidden * beside
                most = max(most, replay)
        stages.append(StageMemory(
            weights=sizes[stage] * state.total
            + is_last * (teacher or 0) * recording.element / recording.tensor_parallel,
            decoder=most_held(stage, by_trip) if most_held else sum(by_trip),
            replay=most,
            heads=head + max(in_flight, window) * waiting if is_last else 0.0,
            states=hidden * states_held(len(split), in_flight, window) if is_first else 0.0,
        ))  # fmt: skip
    return stages
