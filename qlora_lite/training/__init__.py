"""Training: the optimizer step, engine, optimizer, schedule, checkpoints and loop."""
