"""One checkpoint: its files, the model that they make, adapters, its image processor, a forward pass."""
