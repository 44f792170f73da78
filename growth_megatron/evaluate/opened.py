"""A model on the disk as a live one, at whatever layout this world has.

Owns: layout and precision for evaluation, loading, the tokenizer that goes with the model.
Does not own: what a path means (``checkpoint.origin``), the forward pass (``evaluate.live_model``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from growth_megatron.checkpoint.folder.sums import summed_beside
from growth_megatron.checkpoint.origin import Origin, find_origin
from growth_megatron.checkpoint.torch_dist.live_model import load_from_source
from growth_megatron.config.schema import ModelConfig, ParallelConfig, TrainingConfig, layout_problems
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import ConfigError
from growth_megatron.evaluate.live_model import LiveModel
from growth_megatron.growth.masks import as_it_acts
from growth_megatron.model.llama import build_model_chunks
from growth_megatron.model.tensors import TensorSource, split_state_key
from growth_megatron.parallel import collectives, process_groups


@contextmanager
def opened(options: argparse.Namespace, batch_tokens: int = 4096) -> Iterator[tuple[Origin, LiveModel, Tokenizer]]:
    """What the arguments of ``commands.parsing.add_live_model`` name, at their layout, while the context lasts.

    Raises: as ``find_origin``, ``find_tokenizer`` and ``open_model``.
    """
    started = process_groups.start()
    try:
        origin = collectives.on_all_ranks(lambda: find_origin(options.checkpoint))
        given = Path(options.tokenizer) if options.tokenizer else None
        tokenizer = collectives.on_all_ranks(lambda: find_tokenizer(origin, given))
        yield origin, open_model(origin, options.tp, options.pp, options.precision, batch_tokens), tokenizer
    finally:
        if started:
            process_groups.stop()


def open_model(
    origin: Origin, tensor: int = 1, pipeline: int = 1, precision: str | None = None, batch_tokens: int = 4096
) -> LiveModel:
    """The model of ``origin``, a masked one as it acts, on all ranks of the process group.

    Args:
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size; what remains of the world is data parallel.
        precision: fp32 or bf16; default: as stored.
        batch_tokens: of one micro-batch.

    Raises:
        ConfigError: the model or the world size does not divide like that.
        CheckpointError: its files cannot be read, or (DamagedError) are not what their checksums say.
    """
    tensors, geometry = collectives.on_all_ranks(lambda: as_it_acts(origin))
    parallel = _layout(geometry, tensor, pipeline)
    training = {"steps": 1, "global_batch_size": 1, "precision": precision or _stored_precision(tensors)}
    process_groups.set_layout(parallel, seed=0)
    models = build_model_chunks(geometry, parallel, TrainingConfig.model_validate(training))
    with summed_beside(origin.path, origin.manifest.files) as is_sound:
        collectives.on_all_ranks(lambda: load_from_source(tensors, models))
        is_sound()
    for model in models:
        model.eval()
    return LiveModel(models, geometry, parallel, batch_tokens)


def find_tokenizer(origin: Origin, given: Path | None) -> Tokenizer:
    """The tokenizer of ``origin``, or the one that is given.

    Raises: ConfigError if the model has none, DataError if it cannot be read.
    """
    path, note = (given, "") if given is not None else origin.tokenizer()
    if path is None:
        raise ConfigError(f"{origin.path} has no tokenizer ({note}); give one with --tokenizer PATH")
    tokenizer = open_tokenizer(path)
    if tokenizer.vocab_size > origin.geometry.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} entries, the model {origin.geometry.vocab_size}; "
            "give the one that it was trained with as --tokenizer PATH"
        )
    return tokenizer


def _layout(geometry: ModelConfig, tensor: int, pipeline: int) -> ParallelConfig:
    world = collectives.world_size()
    if min(tensor, pipeline) < 1 or world % (tensor * pipeline):
        raise ConfigError(
            f"{world} ranks do not divide into --tp {tensor} x --pp {pipeline}; give sizes from 1 whose product "
            "divides the number of ranks, or start more (torchrun --nproc-per-node N -m growth_megatron ...)"
        )
    parallel = ParallelConfig(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    if problems := layout_problems(geometry, parallel):
        raise ConfigError(f"--tp {tensor} --pp {pipeline}: " + "; ".join(text for _, text in problems))
    return parallel


def _stored_precision(tensors: TensorSource) -> str:
    kinds = {tensors.spec(key).dtype for key in tensors.keys() if split_state_key(key)[0] == ""}
    return "bf16" if kinds == {torch.bfloat16} else "fp32"
