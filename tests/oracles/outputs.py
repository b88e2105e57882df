"""What a model says of the next token, written with loops."""

import math


def token_loss(logits, targets, mask):
    """Mean over the asked tokens of one sequence of −log softmax at the target."""
    found = []
    for z, y, asked in zip(logits.tolist(), targets.tolist(), mask.tolist(), strict=True):
        if asked and y >= 0:
            peak = max(z)
            found.append(peak + math.log(sum(math.exp(value - peak) for value in z)) - z[y])
    return sum(found) / len(found) if found else math.nan
