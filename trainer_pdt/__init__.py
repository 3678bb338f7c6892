"""Data, training and evaluation of the Parallel Decoder Transformer."""
