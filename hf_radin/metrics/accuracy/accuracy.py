"""The accuracy metric of the evaluate library, shipped because evaluate downloads its scripts from the Hub.

evaluate reads the imports below line by line to find what must be installed: one import a line.
"""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """The share of predictions that are right, in [0, 1]."""

    def _info(self):
        return evaluate.MetricInfo(
            description="The share of predictions that are right.",
            citation="",
            inputs_description="predictions and references: the predicted and the true classes, as integers.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
