"""Log-probabilities to a trained policy: losses, schedule, the DeepSpeed engine, checkpoints, metrics."""
