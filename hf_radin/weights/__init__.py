"""Averages of weights, tensor by tensor or model by model, and BatchNorm statistics estimated anew."""
