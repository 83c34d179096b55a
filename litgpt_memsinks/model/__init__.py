"""Which neurons fire? LitGPT's GPT with masked MLPs, its checkpoints, and what it loses on documents."""
