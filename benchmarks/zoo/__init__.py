"""Checkpoints and images that the benchmarks make and run on."""
