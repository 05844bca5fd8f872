"""How likely a backbone finds its samples' answers.

Shape legend: B batch, T tokens, D hidden size, N answer tokens, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hestctl.data.prompts import TrainBatch
from hestctl.model.backbone import Backbone


def answer_loss(backbone: Backbone, batch: TrainBatch) -> Tensor:
    """Summed negative log-likelihood of the answer tokens (nats), ()."""
    return loss_of_hidden(backbone, batch, last_hidden(backbone, batch))


def loss_of_hidden(backbone: Backbone, batch: TrainBatch, hidden_BTD: Tensor) -> Tensor:
    """The same from the hidden states before the head; logits only where they count."""
    hidden_BTD = hidden_BTD[:, :-1]
    target_BT = batch.labels[:, 1:]
    wanted_BT = target_BT != -100
    logits_NV = backbone.model.lm_head(hidden_BTD[wanted_BT])
    return F.cross_entropy(logits_NV.float(), target_BT[wanted_BT], reduction="sum")


def last_hidden(backbone: Backbone, batch: TrainBatch) -> Tensor:
    """Hidden states before the head, (B, T, D)."""
    out = backbone.model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    )
    hidden: Tensor = out.last_hidden_state
    return hidden
