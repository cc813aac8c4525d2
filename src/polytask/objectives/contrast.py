"""InfoNCE within a batch (van den Oord et al. 2018, arXiv 1807.03748; symmetric as in CLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    a_PD: Tensor,
    b_PD: Tensor,
    task_P: Tensor,
    group_P: Tensor,
    temperature_P: Tensor,
    one_sided: bool = False,
) -> Tensor:
    """(P,) mean of -log p(b_i | a_i) and -log p(a_i | b_i) among the pairs of the same task.

    a, b         unit vectors; their product over the temperature is the logit
    group        pairs with the same group belong together as well: they are no negatives of each
                 other, and simply left out of the denominator
    one_sided    only -log p(b_i | a_i)
    A pair alone in its task has nothing to be told apart from: its loss is 0.
    """
    with torch.autocast(a_PD.device.type, enabled=False):
        logits = (a_PD.float() @ b_PD.float().T) / temperature_P.float()[:, None]
    other_task = task_P[:, None] != task_P[None, :]
    twin = group_P[:, None] == group_P[None, :]
    twin = twin & ~torch.eye(len(task_P), dtype=torch.bool, device=task_P.device)
    logits = logits.masked_fill(other_task | twin, float("-inf"))
    own = torch.arange(len(task_P), device=task_P.device)
    forth = F.cross_entropy(logits, own, reduction="none")
    if one_sided:
        return forth
    back = F.cross_entropy(logits.T, own, reduction="none")
    return (forth + back) / 2
