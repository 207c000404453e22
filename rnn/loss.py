"""The loss of the patterns: cross-entropy over what is to be predicted."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that the loss leaves out


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not IGNORED, in nats, in float32 or better: 0, with zero
    gradients, if there is none.

    Raises ValueError unless labels have the shape of logits without their last dimension.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}, "
            f"for logits {tuple(logits.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.flatten()
    # Not the mean of torch: over no label that is 0 / 0.
    total = F.cross_entropy(logits.flatten(0, -2), labels, ignore_index=IGNORED, reduction="sum")
    return total / labels.ne(IGNORED).sum().clamp(min=1)
