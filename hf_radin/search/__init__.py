"""The paper's second and third step: rank candidates by their ensembles, measure within the budget, report."""
