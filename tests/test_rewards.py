"""A reward model as a judge: its numbers by hand, errors per item, cancellation, another tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from danlu.exceptions import RewardError
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.rewards.model import CONFIG_KEY, ModelReward, fold_normaliser, normaliser_of
from danlu.rewards.protocol import Episode, Score
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import train_tokenizer
from danlu.types import Message

Tiny = Callable[..., Any]
QUESTION: tuple[Message, ...] = ({"role": "user", "content": "你好?"},)
EPISODES = [
    Episode((5, 6, 7), (8, 9), True),
    Episode((5, 6, 7), (10,), False),
    Episode((30,), (31, 32, 33, 34, 35, 36, 37), True),
    Episode((40, 41, 42, 43, 44), (8, 9), True),
]


def reward_of(model: Any, normaliser: tuple[float, float] = (0.0, 1.0), **options: Any) -> ModelReward:
    return ModelReward(RootModel(SeparateModels({"reward": model}, [])), normaliser, **options)


def by_hand(model: Any, ids: list[int]) -> float:
    """w . h at the last token, h from the plain trunk on one row."""
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        return float(hidden[0, -1] @ model.score.weight[0])


@pytest.fixture
def plain(tiny: Tiny) -> Any:
    return tiny("llama", scalar=True)


def test_scores_are_the_head_at_the_last_token(plain: Any) -> None:
    found = reward_of(copy.deepcopy(plain), (0.5, 4.0)).score(EPISODES)
    raw = [by_hand(plain, [*e.prompt_ids, *e.response_ids]) for e in EPISODES]
    assert len({round(r, 3) for r in raw}) == 4
    assert [s.error for s in found] == [None] * 4
    assert [s.value for s in found] == pytest.approx([(r - 0.5) / 4.0 for r in raw], rel=1e-4, abs=1e-5)


def test_what_is_longer_than_the_window(plain: Any) -> None:
    """Of 5, 4, 8 and 7 tokens two fit 6 positions; cut at the left end of the prompt, the last one does, too."""
    whole = reward_of(copy.deepcopy(plain), window=6).score(EPISODES)
    assert [s.code for s in whole] == ["", "", "R-WINDOW", "R-WINDOW"] and [s.value is None for s in whole[2:]] == [
        True
    ] * 2
    assert whole[2].error == "8 tokens exceed the 6 positions of the reward model"
    cut = reward_of(copy.deepcopy(plain), window=6, truncate=True).score(EPISODES)
    assert [s.code for s in cut] == ["", "", "R-WINDOW", ""], "of 6 positions an answer of 7 leaves none to its prompt"
    assert cut[3].value == pytest.approx(by_hand(plain, [41, 42, 43, 44, 8, 9]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 8, 12, 4096])
def test_batches_change_nothing(budget: int, plain: Any) -> None:
    whole = [s.value for s in reward_of(copy.deepcopy(plain)).score(EPISODES)]
    found = [s.value for s in reward_of(plain, micro_tokens=budget).score(EPISODES)]
    assert found == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_a_number_that_is_none_is_an_error_of_its_item(plain: Any) -> None:
    with torch.no_grad():
        plain.model.embed_tokens.weight[10] = float("nan")  # only the second answer holds token 10
    found = reward_of(plain, micro_tokens=6).score(EPISODES)
    assert [s.error is None for s in found] == [True, False, True, True]
    assert found[1].value is None and "nan" in str(found[1].error)


def test_a_number_that_is_none_does_not_spoil_its_batch(plain: Any) -> None:
    expected = [s.value for s in reward_of(copy.deepcopy(plain)).score(EPISODES)]
    with torch.no_grad():
        plain.model.embed_tokens.weight[10] = float("nan")
    found = reward_of(plain).score(EPISODES)
    assert found[1].value is None
    assert [found[i].value for i in (0, 2, 3)] == pytest.approx([expected[i] for i in (0, 2, 3)], rel=1e-4, abs=1e-5)


def test_empty_answers_get_no_score(plain: Any) -> None:
    found = reward_of(plain).score([EPISODES[0], Episode((5,), (), False)])
    assert found[0].value is not None and found[1] == Score(None, "empty answer", "R-EMPTY")
    assert reward_of(plain).score([]) == []


def test_cancelling_keeps_what_was_scored(plain: Any) -> None:
    asked: list[None] = []

    def after_two_batches() -> bool:
        asked.append(None)
        return len(asked) > 2

    found = reward_of(plain, micro_tokens=1).score(EPISODES, cancelled=after_two_batches)
    # Shortest first: 4 and 5 tokens are scored, 7 and 8 are not.
    assert [s.error for s in found] == [None, None, "cancelled", "cancelled"]


def test_the_normaliser_travels_in_the_configuration(plain: Any) -> None:
    assert normaliser_of(plain) == (0.0, 1.0)
    setattr(plain.config, CONFIG_KEY, {"mean": 0.25, "std": 2.0})
    assert normaliser_of(plain) == (0.25, 2.0)
    setattr(plain.config, CONFIG_KEY, {"mean": 1.0, "std": 0.0})
    assert normaliser_of(plain) == (1.0, 1.0)


def test_a_folded_normaliser_gives_the_same_scores(plain: Any) -> None:
    setattr(plain.config, CONFIG_KEY, {"mean": -1.5, "std": 0.25})
    before = [s.value for s in reward_of(copy.deepcopy(plain), normaliser_of(plain)).score(EPISODES)]
    raw = [by_hand(plain, [*e.prompt_ids, *e.response_ids]) for e in EPISODES]
    fold_normaliser(plain)
    assert normaliser_of(plain) == (0.0, 1.0)
    folded = [s.value for s in reward_of(plain).score(EPISODES)]
    assert folded == pytest.approx(before, rel=1e-4, abs=1e-5)
    assert folded != pytest.approx(raw, abs=0.5)


# --- a reward model with a tokenizer of its own -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(train_tokenizer(["你好，世界"], 270))


def test_text_is_tokenised_anew(template: ChatTemplate, tiny: Tiny) -> None:
    plain = tiny("llama", scalar=True, vocab_size=270)
    answer: Message = {"role": "assistant", "content": "世界!"}
    ids = template.encode([*QUESTION, answer]).ids
    assert ids[-1] in template.stop_ids
    # The policy's ids mean nothing to this model: 9000 is not even in its vocabulary.
    whole = Episode((9000,), (9001, 9002), True, QUESTION, "世界!")
    cut = Episode((9000,), (9001,), False, QUESTION, "世界!")
    found = reward_of(copy.deepcopy(plain), template=template).score([whole, cut])
    expected = [by_hand(plain, ids), by_hand(plain, ids[:-1])]  # an answer that did not stop has no stop token
    assert [s.value for s in found] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_text_is_needed_for_that(template: ChatTemplate, tiny: Tiny) -> None:
    reward = reward_of(tiny("llama", scalar=True, vocab_size=270), template=template)
    with pytest.raises(RewardError, match="needs the episode's text"):
        reward.score([Episode((5,), (6,), True)])
