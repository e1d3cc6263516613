"""From names to vetted ingredients: where they are, whether they fit together, what their cards say."""
