"""What does the loader yield? Pairs (B, T + 1, 2) for training, and the rows on which documents are scored."""
