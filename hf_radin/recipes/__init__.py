"""Pure arithmetic on arrays: recipes, their ensembles, candidates, scores of many recipes; no files and no models."""
