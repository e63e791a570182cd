"""From what people have (jsonl, parquet, txt, ...) to what the loop reads: arrays of token ids.

files -> formats -> store -> packing -> batches. NumPy only; nothing here imports torch.
"""
