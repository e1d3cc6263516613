"""The last layers of a model, which are taught apart: where they begin, and how they learn from an ensemble."""
