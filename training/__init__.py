"""What the training loop calls besides the engine: optimizer groups, schedule, logging."""
