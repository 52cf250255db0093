"""The step, and what carries it: engine, optimizer, schedule, checkpoints, loop."""
