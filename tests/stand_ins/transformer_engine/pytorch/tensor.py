import torch


class QuantizedTensor(torch.Tensor):
    """Of which no parameter is, without FP8."""
