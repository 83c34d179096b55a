"""What does the released model hold? Plain weights, for LitGPT and for transformers."""
