"""The paper's first step: the bank of logits, computed, stored, published, and what that costs."""
