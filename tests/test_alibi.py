"""ALiBi (Press et al. 2022): a BLOOM goes on working beyond the length it was trained on, where learned positions end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from danlu.exceptions import ModelError
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.training.logprobs import logprobs
from danlu.tree import TreeBatch, conversation, forest

TRAINED, TESTED = 16, 48


def rows(length: int, count: int, seed: int) -> list[list[int]]:
    """Texts in which each token is the one before it plus 1, from a random start on."""
    starts = torch.randint(3, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[3 + (start - 3 + i) % 58 for i in range(length)] for start in starts]


def losses(root: RootModel, texts: list[list[int]]) -> torch.Tensor:
    """Mean loss at every place but the first."""
    tree = TreeBatch.of(forest([conversation(t, [1.0] * len(t)) for t in texts]))
    logp, _ = root(tree, "policy", lambda out: logprobs(out, tree.loss_index()))
    return -logp.view(len(texts), -1).mean(0)


def test_bloom_beyond_its_training_length(tiny: Callable[..., Any]) -> None:
    model = tiny("bloom", seq_length=TRAINED)
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-2)
    for step in range(60):
        loss = losses(root, rows(TRAINED, 16, step)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = losses(root, rows(TESTED, 16, 1000))
        inside, beyond = float(found[4 : TRAINED - 1].mean()), float(found[TRAINED:].mean())
        assert inside < 0.5 and beyond < inside + 0.3
        # The tree's path is transformers' own forward at that length, too.
        [text] = rows(TESTED, 1, 7)
        plain = tiny("bloom", seq_length=TRAINED)
        plain.load_state_dict(model.state_dict())
        own = plain(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        expected = -own.gather(1, torch.tensor(text[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(losses(root, [text]), expected, atol=1e-5, rtol=1e-5)
    learned = tiny("gpt2", n_positions=TRAINED)
    with pytest.raises(ModelError, match="48 tokens exceed the 16 positions"):
        losses(RootModel(SeparateModels({"policy": learned}, [])), rows(TESTED, 1, 0))
