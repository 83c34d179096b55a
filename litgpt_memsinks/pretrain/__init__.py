"""How does `litgpt pretrain` train with sinks? Launching, watching, saving, resuming, signals."""
