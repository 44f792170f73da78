"""LLaMA as megatron-core's GPTModel.

Owns: the translation of a geometry and a layout into a TransformerConfig and a ModuleSpec; SDPA attention; RMSNorm.
Does not own: initial values (``model.init``), wrapping for data parallelism (``train.engine``).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from growth_megatron.config.schema import ModelConfig, ParallelConfig, RopeScaling, TrainingConfig
from growth_megatron.parallel.preflight import what_compiling_lacks

_LOG = logging.getLogger(__name__)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose gain is reduced over tensor-parallel ranks under sequence parallelism.

    ``WrappedTorchNorm`` of megatron-core refuses sequence parallelism; all that it lacks is the mark on the gain.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[s, b, h]``, or ``[s, b, n, d]`` over the channels of each head, normed along its last axis."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # [s, b, h]


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention on ``torch.nn.functional.scaled_dot_product_attention`` (fused on CPU and CUDA).

    megatron-core's own local attention is unfused: it stores the s x s scores for backward.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Query ``[s, b, n, d]``, key and value ``[s, b, groups, d]`` -> ``[s, b, n * d]``."""
        sequence, batch, heads, channels = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
        grouped = heads != key.shape[2]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, heads * channels)


def transformer_config(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> TransformerConfig:
    """megatron-core's configuration of this geometry at this layout."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    interleaved = parallel.model_chunks > 1
    recompute_options: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": training.recompute_modules},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=on_gpu and _can_compile(),
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.model_chunks if interleaved else None,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=training.precision == "bf16",
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        cross_entropy_loss_fusion=False,
        # gloo sends from the tensor itself while the schedule goes on; NCCL has the stream to order the two.
        deallocate_pipeline_outputs=on_gpu,
        deterministic_mode=training.deterministic,
        init_method_std=model.init_std,
        # Its default divides by the number of layers, which may be 0; weights come from a source.
        output_layer_init_method=init_method_normal(model.init_std),
        **recompute_options[training.recompute],
    )


@cache
def _can_compile() -> bool:
    """Whether SwiGLU may be fused, which megatron-core leaves to torch.compile; says once what that lacks."""
    lacks = what_compiling_lacks()
    if lacks is not None:
        _LOG.warning("this machine lacks %s: SwiGLU is not fused, and a step takes some percent longer", lacks)
    return lacks is None


def build_model_chunks(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> list[GPTModel]:
    """This rank's model chunks (one, or one per virtual stage), with undefined weights.

    Needs megatron-core's process groups for ``parallel``. The weights come from a tensor source afterwards.
    """
    config = transformer_config(model, parallel, training)
    return [_build_model_chunk(config, model, parallel, chunk) for chunk in range(parallel.model_chunks)]


def _build_model_chunk(config: TransformerConfig, model: ModelConfig, parallel: ParallelConfig, chunk: int) -> GPTModel:
    vp_stage = chunk if parallel.model_chunks > 1 else None
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    first = pipeline_rank == 0 and chunk == 0
    last = pipeline_rank == parallel.pipeline_parallel_size - 1 and chunk == parallel.model_chunks - 1
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_norm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage, pipeline_rank)
    spec = TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.sequence_length,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        vp_stage=vp_stage,
    )
    if model.rope_scaling is not None:
        _scale_rotary(gpt.rotary_pos_emb, model.rope_scaling)
    _mark_tensor_parallel(gpt)
    if torch.cuda.is_available():
        gpt.cuda(torch.cuda.current_device())
    return gpt.bfloat16() if config.bf16 else gpt


def _scale_rotary(rotary: RotaryEmbedding, scaling: RopeScaling) -> None:
    """LLaMA 3's frequencies; GPTModel's own switch has a factor and three constants where a model has four numbers."""
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq,
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )


def _mark_tensor_parallel(gpt: GPTModel) -> None:
    """Mark split weights as split: megatron-core does so only while it initialises them, and the gradient norm counts
    an unmarked weight on tensor-parallel rank 0 alone.
    """
    for module in gpt.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(tensor=module.weight, is_parallel=True, dim=dim, stride=1)


def _device(config: TransformerConfig) -> torch.device:
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
