"""The subcommands of ``growth-megatron``: one module each, with ``add_parser(subparsers)`` and ``run(options)``.

Owns: their names and what each does in a line. A module is imported when its subcommand is asked for, and no other:
only it may need torch or megatron-core.
"""

COMMANDS = {
    "train": "Run or continue the run in run.directory.",
    "plan": "Say what a run would cost: parameters, FLOPs, memory per rank, bubble. No GPU, no processes.",
    "evaluate": "Run lm-eval's tasks on a checkpoint or a Hugging Face folder, at any parallel layout.",
    "sample": "Write text with a checkpoint or a Hugging Face folder, from prompts.",
    "report": "Final figures of a run, and its page with curves and history (RUN/report.html).",
    "watch": "Show a run while it goes, or as it ended: the live view of train, from its metrics alone.",
    "publish": "Show a run in wandb or TensorBoard, from its metrics, whatever it was trained with.",
    "probe": "Train several growths of a checkpoint for a while and say which is ahead.",
    "compare": "Say what growth saved: runs against a baseline at equal loss, over seeds, with a picture.",
    "advise": "Say from a run's own curve and published fits whether to grow it, when and by how much.",
    "guideline": "Say when to grow and by how much, by the fit of arXiv 2405.15319.",
    "grow": "Write a grown copy of a checkpoint: deeper, wider or both, with its optimizer state.",
    "inspect": "Say what a checkpoint holds: progress, geometry, layout, lineage, tensors.",
    "verify": "Check that a checkpoint, or every checkpoint of a run, is whole, and a grown one what its growth gives.",
    "import-hf": "Write a Hugging Face LLaMA (config.json, safetensors) as a checkpoint that train resumes from.",
    "import-megatron": "Take over a checkpoint of megatron-core or Megatron-LM, with its optimizer state, by links.",
    "export-hf": "Write a checkpoint as a Hugging Face LlamaForCausalLM, with its tokenizer.",
    "train-tokenizer": "Train a SentencePiece tokenizer (BPE, byte fallback).",
    "prepare-data": "Tokenize text (.txt, .jsonl, also .gz and .zst; folders) into Megatron's .bin and .idx.",
}
