"""Real checkpoints on real images, made anew by whoever runs a benchmark."""
