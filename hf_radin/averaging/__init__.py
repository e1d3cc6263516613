"""Soups without data: from names of checkpoints, and weights that somebody gives, to a checkpoint."""
