"""Pure arithmetic on arrays: recipes, their ensembles, candidates, metrics, intervals; no files and no models."""
