"""Teaching one fact: probe, learn it while the answers to everything else are held, probe again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from danlu.assistant import Assistant
from danlu.data.collate import Trees
from danlu.generation.protocol import SamplingParams
from danlu.generation.seeds import mix_seed
from danlu.knowledge.adapter import ROLE, adapted, factors_of
from danlu.knowledge.facts import Fact
from danlu.knowledge.memory import Answers, divergence, encode, judge, remember
from danlu.knowledge.natural import Changes, cut, metrics_of
from danlu.knowledge.phrasings import Asked, questions_about, user
from danlu.knowledge.probe import Locality, Recall, conversations, locality, plain, recall
from danlu.knowledge.replay import Pool, Question, contrast, near_and_far
from danlu.knowledge_config import TeachSettings
from danlu.losses.distil import leads
from danlu.models.patches import Factors, add_factors, restore
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel, TrunkOutput
from danlu.text.chat_template import ChatTemplate
from danlu.training.compute import Compute
from danlu.training.fisher import Metric, learning
from danlu.training.rank_allocation import allocation_of, orthogonality
from danlu.training.step import language_loss
from danlu.tree import TreeBatch
from danlu.types import Message

Action = Literal["teach", "update", "forget"]
CHECK_EVERY = 10  # steps between looks at whether the fact is recalled
PATIENCE = 20  # steps without a lower loss, where the loss decides (the notebook's)
LAST_RATE = 0.1  # share of the rate at the last step
HARD_FROM = 80  # steps after which phrasings that are not sure are drawn more often; most facts do without, and keep other answers
SETTLE = 20  # steps after all phrasings are sure, shorter and shorter
NATURAL_KL, ADAPTER_KL = 8.0, 1.0  # weights of the divergence where the settings say none
MAX_ANSWER = 96  # tokens of a probe's answer, or twice the fact's if that is more
EARLIER_PROBED = 3  # phrasings of each earlier fact among the locality probes


@dataclass(frozen=True)
class Lesson:
    """What came of teaching one fact.

    factors: the change; it is in the model's weights already if `accepted`.
    complaint: why a patch is not accepted, or "".
    """

    fact: Fact
    action: Action
    factors: dict[str, Factors]
    before: Recall
    after: Recall
    locality: Locality
    steps: int
    seconds: float
    complaint: str
    losses: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What is kept with the patch and shown by `--json`."""
        return {
            **self.after.as_dict(),
            "locality": self.locality.as_dict(),
            "seconds": self.seconds,
            "before": self.before.as_dict(),
            "steps": self.steps,
            "complaint": self.complaint,
        }


class Pupil:
    """A loaded model that is taught.

    Attributes:
        model: its weights change with every accepted fact.
        known: the facts it was taught, as it should answer them.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: TeachSettings, pool: Pool, known: Sequence[Fact] = ()
    ) -> None:
        self.model = model
        self.template = ChatTemplate(tokenizer)
        self.settings = settings
        self.pool = pool
        self.known = list(known)
        self.compute = _compute(settings)
        model.to(self.compute.device)
        self._general: tuple[Held, Held] | None = None
        self._metrics: dict[str, Metric] = {}
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 2048)

    def answer(self, asked: Sequence[Sequence[Message]], tokens: int = MAX_ANSWER) -> list[str]:
        """The likeliest answers. An engine of its own each time: it may keep what it read with other weights."""
        if not asked:
            return []
        assistant = Assistant(self.model.eval(), self.template.tokenizer)
        fitted = [self._fitted(messages, tokens) for messages in asked]
        replies = assistant.generate(fitted, SamplingParams(max_new_tokens=tokens, temperature=0.0))
        return [r.text for r in replies]

    def _fitted(self, messages: Sequence[Message], tokens: int) -> Sequence[Message]:
        """A conversation without the first exchanges that leave no room for an answer: a reply may fill a small context."""
        while len(messages) > 2 and len(self.template.encode_prompt(list(messages))) + tokens > self.context:
            messages = messages[2:]
        return messages

    def length_of(self, text: str) -> int:
        return len(self.template.text_ids([text])[0])

    def hold(self, asked: list[Question]) -> Held:
        """The model's answers now, and its distributions; questions that leave no room for an answer are left out."""
        questions = [q for q in asked if len(self.template.encode_prompt(q.messages)) + MAX_ANSWER <= self.context]
        texts = self.answer([q.messages for q in questions])
        answers = self.encode([(q.messages, t or "...") for q, t in zip(questions, texts, strict=True)])
        return Held(questions, texts, remember(self.root(), answers, self.compute))

    def general_replay(self) -> tuple[Held, Held]:
        """Replayed questions that have nothing to do with a fact, and a fact's phrasings about other names; answered once, before
        the first lesson.
        """
        if self._general is None:
            chosen = list(self.pool.replay[: self.settings.replay_pool])
            others = contrast([f.keyword for f in self.known], probe=False)
            self._general = self.hold(chosen), self.hold(others)
        return self._general

    def metrics(self) -> dict[str, Metric]:
        """What a change of each layer does to the replayed answers; measured once, before the first lesson."""
        if not self._metrics:
            settings = self.settings
            told = [held.answers.trees for held in self.general_replay()]
            self._metrics = metrics_of(self.model, self.root(), told, settings.target, self.compute, settings.seed)
        return self._metrics

    def general_probes(self) -> list[Question]:
        """Probes that have nothing to do with a fact; the same for every lesson."""
        return [*self.pool.probes[: self.settings.probes], *contrast([f.keyword for f in self.known], probe=True)]

    def encode(self, dialogues: Sequence[tuple[Sequence[Message], str]]) -> Answers:
        return encode(dialogues, self.template, self.context)

    def root(self) -> RootModel:
        """The model as it is, for reading given answers."""
        return RootModel(SeparateModels({"policy": self.model}, [])).eval()


def _compute(settings: TeachSettings) -> Compute:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = settings.dtype if settings.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return Compute(device, chosen, 0)


@dataclass(frozen=True)
class Held:
    """Questions with a model's own answers, and what it thought at each of their tokens."""

    questions: list[Question]
    texts: list[str]
    answers: Answers

    def without(self, taken: set[str]) -> Held:
        """The same without questions (as `plain` text) that are about a fact: those must not stay as they are."""
        left = [i for i, q in enumerate(self.questions) if plain(q.text) not in taken]
        if len(left) == len(self.questions):
            return self
        told = self.answers
        fewer = Answers(
            Trees([told.trees.items[i] for i in left]), [told.kept[i] for i in left], [told.ids[i] for i in left]
        )
        return Held([self.questions[i] for i in left], [self.texts[i] for i in left], fewer)


@dataclass
class _Material:
    """All that one lesson learns from and is measured by.

    near: for each probe whether it is about a neighbour of the fact; data: what perplexity is taken of, the data's own answers
    where it has them; nll: of these, before, in nats per token.
    """

    fact: Answers
    earlier: Answers
    replay: list[Answers]
    probes: Held
    near: list[bool]
    data: Answers
    nll: float


def teach_one(
    pupil: Pupil,
    fact: Fact,
    *,
    action: Action = "teach",
    force: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Lesson:
    """Teaches a fact and says what came of it; the model's weights are as before if the patch is not accepted.

    Args:
        fact: for "forget" its description is what is to be said in its place.
        force: accept a patch that does not recall the fact or moves other answers.
    """
    begun = time.monotonic()
    settings = pupil.settings
    questions = questions_about(fact, both=settings.both_languages)
    tokens = max(MAX_ANSWER, 2 * pupil.length_of(fact.description))
    before = recall(questions, lambda asked: pupil.answer(asked, tokens))
    earlier = [f for f in pupil.known if f.key != fact.key]
    material = _material(pupil, fact, earlier)
    learn = _learn_naturally if settings.adapter == "natural" else _learn
    factors, losses = learn(pupil, material, on_step)
    untouched = add_factors(pupil.model, factors)
    after = recall(questions, lambda asked: pupil.answer(asked, tokens))
    moved = _locality(pupil, material)
    complaint = _complaint(after, moved, settings)
    lesson = Lesson(
        fact, action, factors, before, after, moved, len(losses), time.monotonic() - begun, complaint, losses
    )
    if complaint and not force:
        restore(pupil.model, untouched)
    else:
        pupil.known = [*earlier, fact]
    return lesson


def _material(pupil: Pupil, fact: Fact, earlier: list[Fact]) -> _Material:
    settings = pupil.settings
    questions = questions_about(fact, both=settings.both_languages)
    asked = [*questions.trained, *(questions.varied if settings.varied else ())]
    old = [questions_about(f, both=settings.both_languages) for f in earlier]
    taken = {plain(a.question) for q in (questions, *old) for a in q.everything}
    replay = []
    if settings.replay_batch:
        # What is near this fact is asked anew; the rest was answered before the first lesson, so that nothing drifts.
        near, _ = near_and_far(pupil.pool.replay, fact, settings.replay_pool // 2)
        replay = [h.without(taken).answers for h in (pupil.hold(near), *pupil.general_replay())]
        replay = [a for a in replay if len(a)]
    near, _ = near_and_far(pupil.pool.probes, fact, settings.probes // 2)
    near += [Question((user(a.question),)) for q in old for a in q.unseen[:EARLIER_PROBED]]
    general = [q for q in pupil.general_probes() if plain(q.text) not in taken]
    held = pupil.hold([*near, *general])
    neighbours = {id(q) for q in near}
    data = pupil.encode(
        [(q.messages, q.reference or t or "...") for q, t in zip(held.questions, held.texts, strict=True)]
    )
    return _Material(
        fact=pupil.encode(_dialogues(pupil, asked)),
        earlier=pupil.encode(_dialogues(pupil, [a for q in old for a in q.trained])),
        replay=replay,
        probes=held,
        near=[id(q) in neighbours for q in held.questions],
        data=data,
        nll=_nll(pupil.root(), data, pupil.compute),
    )


def _nll(root: RootModel, answers: Answers, compute: Compute) -> float:
    told = judge(root, answers, compute)
    return sum(told.nll) / max(1, sum(told.tokens))


def _dialogues(pupil: Pupil, asked: Sequence[Asked]) -> list[tuple[list[Message], str]]:
    return list(zip(conversations(asked, pupil.answer), [a.expected[0] for a in asked], strict=True))


def _learn_naturally(
    pupil: Pupil, material: _Material, on_step: Callable[[int, float], None]
) -> tuple[dict[str, Factors], list[float]]:
    """The loop of natural gradients (`natural.py`): until every phrasing is sure, some shorter and shorter steps more, and then the
    cut to a rank, if the fact survives it.
    """
    settings, compute = pupil.settings, pupil.compute
    metrics = pupil.metrics()
    root = pupil.root().train()
    changes = Changes(pupil.model, metrics)
    rng = np.random.default_rng([settings.seed, 0x1EA2])
    losses: list[float] = []
    sure = 0  # the step at which it was
    hold = settings.kl_weight if settings.kl_weight is not None else NATURAL_KL
    enough = settings.fact_margin / 2
    seen = Sureness([], [])
    try:
        with learning(pupil.model, changes.layers):
            for step in range(1, settings.max_steps + 1):
                weak = _below(seen.fact, enough) if step > HARD_FROM else []
                chosen = _draw(rng, len(material.fact), settings.phrasings, weak)
                loss = _press(root, material.fact, chosen, settings.fact_margin, compute)
                if len(material.earlier) and settings.earlier_batch:
                    weak = _below(seen.earlier, settings.lead) if step > HARD_FROM else []
                    chosen = _draw(rng, len(material.earlier), settings.earlier_batch, weak)
                    _press(root, material.earlier, chosen, settings.fact_margin, compute)
                for held in material.replay:
                    chosen = _draw(rng, len(held), settings.replay_batch // len(material.replay))
                    _hold(root, held, chosen, pupil, weight=hold, margin=0.0)
                share = 1.0 - (1.0 - LAST_RATE) * (step - sure) / SETTLE if sure else 1.0
                changes.step(settings.trust * share)
                losses.append(loss)
                on_step(step, loss)
                if sure and step - sure == SETTLE:
                    seen = _sureness(root, material, pupil)
                    if seen.at_least(settings.lead, settings.lead):
                        break
                    sure = 0
                elif not sure and step % CHECK_EVERY == 0:
                    seen = _sureness(root, material, pupil)
                    if seen.at_least(enough, settings.lead):
                        sure = step
        return cut(changes, settings.rank, lambda: _sure(root, material, pupil)), losses
    finally:
        changes.close()


def _learn(
    pupil: Pupil, material: _Material, on_step: Callable[[int, float], None]
) -> tuple[dict[str, Factors], list[float]]:
    """The loop of an adapter: each step some phrasings of the fact, some of earlier facts, some answers that must stay."""
    settings, compute = pupil.settings, pupil.compute
    roles = adapted(pupil.model, settings, mix_seed(settings.seed, 0xFAC7))
    root = RootModel(roles).to(compute.device).train()
    trained = [p for p in roles.parameters() if p.requires_grad]
    allocation = allocation_of(root, 1)
    optimizer = torch.optim.Adam(trained, lr=settings.learning_rate)
    rng = np.random.default_rng([settings.seed, 0x1EA2])
    hold = settings.kl_weight if settings.kl_weight is not None else ADAPTER_KL
    losses: list[float] = []
    try:
        for step in range(1, settings.max_steps + 1):
            rate = 1.0 - (1.0 - LAST_RATE) * (step - 1) / settings.max_steps
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (rate if settings.stop == "recall" else 1.0)
            loss = _imitate(root, material.fact, _draw(rng, len(material.fact), settings.phrasings), compute)
            if len(material.earlier) and settings.earlier_batch:
                _imitate(root, material.earlier, _draw(rng, len(material.earlier), settings.earlier_batch), compute)
            for held in material.replay:
                chosen = _draw(rng, len(held), settings.replay_batch // len(material.replay))
                _hold(root, held, chosen, pupil, weight=hold, margin=settings.margin)
            penalty = orthogonality(root, ROLE)
            if penalty is not None:
                penalty.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if allocation is not None:
                allocation.update(ROLE)
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            on_step(step, loss)
            if settings.stop == "loss":
                if len(losses) - 1 - int(np.argmin(losses)) >= PATIENCE:
                    break
            elif step % CHECK_EVERY == 0 and _sure(root, material, pupil) and _kept(root, material, pupil):
                break
        return factors_of(roles), losses
    finally:
        roles.unload()


def _below(leads: Sequence[float], least: float) -> list[int]:
    return [i for i, lead in enumerate(leads) if lead < least]


def _draw(rng: np.random.Generator, among: int, count: int, weak: Sequence[int] = ()) -> list[int]:
    """`count` numbers below `among`, each once; up to half of them are out of `weak`."""
    first = rng.choice(weak, size=min(len(weak), count // 2), replace=False).tolist() if weak else []
    others = [i for i in range(among) if i not in first]
    rest = rng.choice(others, size=min(len(others), count - len(first)), replace=False).tolist()
    return sorted([*first, *rest])


def _imitate(root: RootModel, answers: Answers, chosen: list[int], compute: Compute) -> float:
    tree = answers.trees.batch(chosen).to(compute.device)
    weight = float(answers.trees.weights[chosen].sum())
    with compute.autocast():
        loss, metrics = root(tree, "policy", lambda out: language_loss(out, weight), reads=TreeBatch.before_loss)
    loss.backward()
    return float(metrics["loss_sum"]) / weight


def _press(root: RootModel, answers: Answers, chosen: list[int], goal: float, compute: Compute) -> float:
    """The mean of what each token's lead over the likeliest other one lacks of `goal`: it ends where the answer is sure, whereas
    cross-entropy would go on to move a model whose rare tokens never get a high probability.
    """
    tree = answers.trees.batch(chosen).to(compute.device)

    def head(out: TrunkOutput) -> Tensor:
        index = out.tree.loss_index()
        logits = out.logits(out.tree.predictor_T[index])
        return torch.relu(goal - leads(logits, out.tree.input_ids_T[index])).mean()

    with compute.autocast():
        loss = root(tree, "policy", head)
    loss.backward()
    return float(loss.detach())


def _hold(root: RootModel, replay: Answers, chosen: list[int], pupil: Pupil, *, weight: float, margin: float) -> None:
    tree = replay.trees.batch(chosen).to(pupil.compute.device)
    kept, ids = (torch.cat([part[i] for i in chosen]) for part in (replay.kept, replay.ids))
    with pupil.compute.autocast():
        kl, lead = root(tree, "policy", lambda out: divergence(out, kept, ids))
    loss = weight * kl.mean()
    if margin:
        # Where two words are nearly as likely, a breath would change the answer: the hinge holds the one that was said.
        loss = loss + torch.relu(margin - lead).mean()
    (len(chosen) / pupil.settings.replay_batch * loss).backward()


@dataclass(frozen=True, slots=True)
class Sureness:
    """For each trained phrasing the least lead of a token of its answer over the likeliest other one, in nats."""

    fact: list[float]
    earlier: list[float]

    def at_least(self, fact: float, earlier: float) -> bool:
        return min(self.fact, default=math.inf) >= fact and min(self.earlier, default=math.inf) >= earlier


def _sureness(root: RootModel, material: _Material, pupil: Pupil) -> Sureness:
    root.eval()
    try:
        return Sureness(*(judge(root, told, pupil.compute).lead for told in (material.fact, material.earlier)))
    finally:
        root.train()


def _sure(root: RootModel, material: _Material, pupil: Pupil) -> bool:
    """Every trained phrasing, of earlier facts too, is answered with the settings' lead at each token."""
    return _sureness(root, material, pupil).at_least(pupil.settings.lead, pupil.settings.lead)


def _kept(root: RootModel, material: _Material, pupil: Pupil) -> bool:
    """The replayed answers are what they were, but for few."""
    root.eval()
    try:
        same = [g for held in material.replay for g in judge(root, held, pupil.compute).greedy]
        return not same or sum(same) / len(same) >= pupil.settings.kept
    finally:
        root.train()


def _locality(pupil: Pupil, material: _Material) -> Locality:
    texts = pupil.answer([q.messages for q in material.probes.questions])
    root = pupil.root()
    told = judge(root, material.probes.answers, pupil.compute)
    return locality(
        material.probes.texts,
        texts,
        material.near,
        kl=sum(told.kl) / max(1, sum(told.tokens)),
        nll_before=material.nll,
        nll_after=_nll(root, material.data, pupil.compute),
    )


def _complaint(after: Recall, moved: Locality, settings: TeachSettings) -> str:
    """Why a patch is not accepted: the fact is not recalled, or other answers moved too far."""
    wrong = []
    if after.trained is not None and after.trained < 1.0:
        wrong.append(f"only {after.trained:.0%} of the trained phrasings recall it")
    if moved.agreement < settings.min_agreement:
        wrong.append(f"{moved.agreement:.1%} of other answers stayed the same (at least {settings.min_agreement:.0%})")
    if moved.kl > settings.max_kl:
        wrong.append(f"other answers moved by {moved.kl:.3f} nats a token (at most {settings.max_kl})")
    if moved.perplexity_ratio > settings.max_perplexity_ratio:
        wrong.append(f"perplexity grew {moved.perplexity_ratio:.3f}-fold (at most {settings.max_perplexity_ratio})")
    return "; ".join(wrong)
