"""What several models have in common: equal tensors, held once, and the modules that need to run once for all."""
