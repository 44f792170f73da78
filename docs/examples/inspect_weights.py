"""The norm of every row of the first layer's ffn, read in blocks, from a checkpoint saved at any layout."""

import sys

from growth_megatron.checkpoint.origin import find_origin

ROWS = 16

if __name__ == "__main__":
    origin = find_origin(sys.argv[1])
    print(f"{origin.path}: {origin.geometry.num_layers} layers, step {origin.manifest.step}")
    key = "decoder.layers.0.mlp.linear_fc1.weight"  # gate rows, then up rows: [2 ffn, hidden]
    rows, columns = origin.tensors.spec(key).shape
    for start in range(0, rows, ROWS):
        block = origin.tensors.read(key, (slice(start, min(start + ROWS, rows)), slice(0, columns)))
        print(f"rows from {start:4d}: mean norm {block.norm(dim=1).mean():.4f}")
