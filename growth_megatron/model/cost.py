"""Arithmetic of a model at a layout: parameters, FLOPs, bytes per rank, pipeline bubble.

Owns: closed formulas over a geometry and a layout; every one counts what this package's model keeps.
Does not own: runs and stages as a whole (``train.plan``).

Symbols: s sequence, b micro-batch, h hidden, n heads, g query groups, d head channels, f ffn, V padded vocabulary,
L layers, t tensor-parallel size, p pipeline-parallel size, v model chunks per pipeline rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from growth_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig, TrainingConfig
from growth_megatron.model.architecture import EMBEDDING, FINAL_NORM, OUTPUT, Row, layer_rows, numel, outer_rows

FP32_BYTES = 4
_MOMENTS_BYTES = 2 * FP32_BYTES  # exp_avg and exp_avg_sq


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model; embedding and output matrix at the padded vocabulary."""

    embedding: int
    per_layer: int
    layers: int
    final_norm: int
    output: int
    """0 where the output shares the embedding's weights."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.layers + self.final_norm + self.output

    @property
    def without_embeddings(self) -> int:
        """Without the embedding and the output matrix."""
        return self.layers + self.final_norm


@dataclass(frozen=True)
class RankMemory:
    """Bytes that each rank of one pipeline stage holds; its tensor- and data-parallel ranks hold the same."""

    pipeline_rank: int
    num_layers: int
    has_embedding: bool
    has_output: bool
    parameters: int
    """Parameters stored on the rank, after tensor-parallel splitting."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    copies_bytes: int = 0
    """Of weights behind masks while a step runs, and of those that the optimizer treats apart while it steps."""

    @property
    def total_bytes(self) -> int:
        """All that is counted for the rank."""
        kept = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return kept + self.activations_bytes + self.copies_bytes


def _layer_matrices(model: ModelConfig) -> int:
    """Entries of one layer's matrices, each of which multiplies every token."""
    return sum(numel(row, model) for row in layer_rows(model) if row.is_matrix)


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Exact number of parameters."""
    per_layer = sum(numel(row, model) for row in layer_rows(model))
    outer = {row: numel(row, model) for row in outer_rows(model)}
    return ParameterCount(
        embedding=outer[EMBEDDING],
        per_layer=per_layer,
        layers=model.num_layers * per_layer,
        final_norm=outer[FINAL_NORM],
        output=outer.get(OUTPUT, 0),
    )


def flops_per_token(model: ModelConfig) -> int:
    """Matrix-multiply FLOPs per token of forward and backward, 6 (matrices + V h) + 12 L s n d.

    Each matrix entry costs 2 FLOPs per token forward and 4 backward; the embedding is a look-up and costs none, the
    output matrix counts whether tied or not. Scores and their product with the values cost 4 s n d per token and layer
    forward; all s positions are counted, although the causal mask lets a kernel skip half of them, and recomputation is
    not counted (PaLM, arXiv 2204.02311, appendix B).
    """
    matrices = model.num_layers * _layer_matrices(model) + numel(OUTPUT, model)
    attention = model.num_layers * model.sequence_length * model.num_attention_heads * model.head_dim
    return 6 * matrices + 12 * attention


def element_bytes(training: TrainingConfig) -> int:
    """Bytes of a weight or activation in training precision."""
    return 2 if training.precision == "bf16" else FP32_BYTES


def checkpoint_bytes(model: ModelConfig, training: TrainingConfig) -> int:
    """Bytes of a checkpoint's tensors: weights as trained, fp32 master copy, two fp32 moments."""
    return parameter_count(model).total * (element_bytes(training) + FP32_BYTES + _MOMENTS_BYTES)


def bubble_to_ideal(parallel: ParallelConfig, micro_batches: int) -> float:
    """Idle over useful time of a pipeline, (p - 1) / (m v)."""
    return (parallel.pipeline_parallel_size - 1) / (micro_batches * parallel.model_chunks)


def bubble_fraction(parallel: ParallelConfig, micro_batches: int) -> float:
    """Share of a step that each pipeline rank idles, (p - 1) / (m v + p - 1)."""
    idle = parallel.pipeline_parallel_size - 1
    return idle / (micro_batches * parallel.model_chunks + idle)


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, pipeline_rank: int) -> int:
    """Parameters stored on a rank: matrices split over t ranks, norm gains on all of them.

    Tied embeddings are stored on the first and again on the last pipeline stage, where these differ.
    """
    size, tensor = parallel.pipeline_parallel_size, parallel.tensor_parallel_size

    def stored(row: Row) -> int:
        return numel(row, model) // (tensor if row.split_axis is not None else 1)

    count = model.num_layers // size * sum(map(stored, layer_rows(model)))
    if pipeline_rank == 0:
        count += stored(EMBEDDING)
    if pipeline_rank == size - 1:
        count += stored(FINAL_NORM)
        if not (model.tie_embeddings and size == 1):
            count += stored(OUTPUT)
    return count


def layers_of_rank(layers: int, parallel: ParallelConfig, pipeline_rank: int) -> list[int]:
    """Numbers of the layers that a pipeline rank holds, of all its model chunks."""
    size, chunks = parallel.pipeline_parallel_size, parallel.model_chunks
    each = layers // (size * chunks)
    return [(chunk * size + pipeline_rank) * each + number for chunk in range(chunks) for number in range(each)]


def outer_of_rank(model: ModelConfig, parallel: ParallelConfig, pipeline_rank: int) -> list[Row]:
    """Tensors beside the layers that a pipeline rank holds, the last one's copy of a tied embedding among them."""
    last = parallel.pipeline_parallel_size - 1
    found = [row for row in outer_rows(model) if pipeline_rank == (0 if row is EMBEDDING else last)]
    return [*found, EMBEDDING] if model.tie_embeddings and pipeline_rank == last and last > 0 else found


def rank_memory(stage: StageConfig, pipeline_rank: int, data_parallel_size: int, micro_batches: int) -> RankMemory:
    """Bytes on each rank of pipeline stage ``pipeline_rank``.

    Weights in training precision; gradients accumulated in one fp32 buffer (``grad_reduce_in_fp32``); of the optimizer
    each data-parallel rank holds its share: two fp32 moments and, in bf16 training, fp32 master weights.
    """
    parallel = stage.parallel
    parameters = rank_parameters(stage.model, parallel, pipeline_rank)
    master = FP32_BYTES if stage.training.precision == "bf16" else 0
    return RankMemory(
        pipeline_rank=pipeline_rank,
        num_layers=stage.model.num_layers // parallel.pipeline_parallel_size,
        has_embedding=pipeline_rank == 0,
        has_output=pipeline_rank == parallel.pipeline_parallel_size - 1,
        parameters=parameters,
        weights_bytes=parameters * element_bytes(stage.training),
        gradients_bytes=parameters * FP32_BYTES,
        optimizer_bytes=-(-parameters // data_parallel_size) * (master + _MOMENTS_BYTES),
        activations_bytes=activation_bytes(stage, pipeline_rank, micro_batches),
    )


def layers_in_flight(parallel: ParallelConfig, num_layers: int, pipeline_rank: int, micro_batches: int) -> int:
    """Layers whose activations a rank holds at its peak, each counted once per micro-batch.

    1F1B has p - rank micro-batches under way, the interleaved schedule 2 (p - rank - 1) + (v - 1) p + 1 passes
    through a chunk of L / (p v) layers (megatron-core's warm-up and the one that follows); never more than there are.
    """
    size, chunks = parallel.pipeline_parallel_size, parallel.model_chunks
    passes = size - pipeline_rank
    if chunks > 1:
        passes = 2 * (size - pipeline_rank - 1) + (chunks - 1) * size + 1
    return min(passes, micro_batches * chunks) * (num_layers // (size * chunks))


def activation_bytes(stage: StageConfig, pipeline_rank: int, micro_batches: int) -> int:
    """Peak bytes of activations on a rank: saved for backward, one layer being recomputed, the largest temporary."""
    parallel, model = stage.parallel, stage.model
    layers = layers_in_flight(parallel, model.num_layers, pipeline_rank, micro_batches)
    total = layers * layer_saved_bytes(stage)
    tokens = model.sequence_length * stage.training.micro_batch_size
    width, tensor = element_bytes(stage.training), parallel.tensor_parallel_size
    temporary = 3 * width * tokens * model.ffn_hidden_size // tensor  # gradients inside the MLP
    if stage.training.recompute == "full":
        total += _norms_bytes(stage, 2) + _attention_bytes(stage) + _mlp_bytes(stage)
    else:
        recomputed = {
            "core_attn": _core_attention_output_bytes(stage) + _log_sum_exp_bytes(stage),
            "mlp": _mlp_bytes(stage),
        }
        total += max((recomputed[module] for module in stage.training.recompute_modules or ()), default=0)
    if pipeline_rank == 0:
        total += 8 * tokens  # token ids
    if pipeline_rank == parallel.pipeline_parallel_size - 1:
        total += head_saved_bytes(stage)
        if stage.training.precision == "bf16":  # logits exist in bf16 beside the fp32 copy that is kept
            temporary = max(temporary, width * tokens * model.padded_vocab_size // tensor)
    return total + temporary


def layer_saved_bytes(stage: StageConfig, fused: bool = True) -> int:
    """Bytes that one layer saves for backward of one micro-batch.

    Args:
        fused: RMSNorm and SwiGLU save their inputs only, as their CUDA kernels do; False for what the CPU's keep.
    """
    model, parallel = stage.model, stage.parallel
    if stage.training.recompute == "full":  # the layer's input
        split = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
        return element_bytes(stage.training) * _tokens(stage) * model.hidden_size // split
    saved = _norms_bytes(stage, 2, fused) + _attention_bytes(stage) + _mlp_bytes(stage, fused)
    modules = stage.training.recompute_modules or ()
    if "core_attn" in modules:  # q, k and v are its inputs and its output is the projection's
        saved -= _log_sum_exp_bytes(stage)
    if "mlp" in modules:  # its input is the norm's output
        saved -= _mlp_bytes(stage, fused)
    return saved


def head_saved_bytes(stage: StageConfig, fused: bool = True) -> int:
    """Bytes that final norm, output matrix and loss save: the norm, fp32 softmax [s, b, V/t], target mask and index."""
    vocabulary = stage.model.padded_vocab_size // stage.parallel.tensor_parallel_size
    return _norms_bytes(stage, 1, fused) + _tokens(stage) * (FP32_BYTES * vocabulary + 1 + 8)


def _tokens(stage: StageConfig) -> int:
    return stage.model.sequence_length * stage.training.micro_batch_size


def _norms_bytes(stage: StageConfig, count: int, fused: bool = True) -> int:
    """Norms with the outputs that the next matrix saves: input and output [s, b, h], 1 / rms [s, b] in fp32.

    Under sequence parallelism each rank has its 1/t of the sequence, and the matrix gathers it again in backward.
    """
    split = stage.parallel.tensor_parallel_size if stage.parallel.sequence_parallel else 1
    width = element_bytes(stage.training)
    kept = 2 * width if fused else 2 * FP32_BYTES + width  # unfused: input and normalised input in fp32
    return count * (_tokens(stage) * (kept * stage.model.hidden_size + FP32_BYTES)) // split


def _log_sum_exp_bytes(stage: StageConfig) -> int:
    return FP32_BYTES * _tokens(stage) * stage.model.num_attention_heads // stage.parallel.tensor_parallel_size


def _core_attention_output_bytes(stage: StageConfig) -> int:
    heads = stage.model.num_attention_heads // stage.parallel.tensor_parallel_size
    return element_bytes(stage.training) * _tokens(stage) * heads * stage.model.head_dim


def _attention_bytes(stage: StageConfig) -> int:
    """Fused qkv (kept alive by v, a view of it), rotated q and k, SDPA's output, log-sum-exp, and sin and cos twice."""
    model, tensor = stage.model, stage.parallel.tensor_parallel_size
    heads, groups = model.num_attention_heads // tensor, model.num_query_groups // tensor
    channels = (heads + 2 * groups + heads + groups + heads) * model.head_dim
    rotary = 4 * model.sequence_length * model.head_dim
    return element_bytes(stage.training) * (_tokens(stage) * channels + rotary) + _log_sum_exp_bytes(stage)


def _mlp_bytes(stage: StageConfig, fused: bool = True) -> int:
    """Gate and up [s, b, 2f/t] and their product [s, b, f/t]; unfused also silu(gate) and a copy of up."""
    ffn = stage.model.ffn_hidden_size // stage.parallel.tensor_parallel_size
    return element_bytes(stage.training) * _tokens(stage) * ffn * (3 if fused else 5)
