"""From settings to the reward of a stage: everything that scores answers, checked before any training step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from danlu import reward_config as config
from danlu.alignment_config import RolloutSettings
from danlu.data.collate import EncodedPrompt
from danlu.exceptions import DataError, SettingsError
from danlu.rewards.combine import Combined, Term
from danlu.rewards.function import FunctionReward, load_function
from danlu.rewards.http import HttpReward
from danlu.rewards.judge import JudgeReward
from danlu.rewards.protocol import Reward
from danlu.rewards.rules import RuleReward, format_of, length_of, repetition_of
from danlu.rewards.sandbox import Limits, isolation
from danlu.rewards.verifiers import VERIFIERS, Verifier
from danlu.train_config import as_models

MODEL, VERIFIER = "model", "verifier"
CACHE = "asked"


def rewards_of(
    settings: RolloutSettings,
    prompts: Sequence[EncodedPrompt],
    folder: Path,
    *,
    judge: Callable[[], Reward] | None,
) -> Combined:
    """Everything that scores a stage's answers, as one reward.

    Args:
        prompts: that are trained on.
        folder: of the stage; what servers answered is kept in it.
        judge: loads the reward model; called last, and only if everything else is right. None: there is none.

    Raises:
        SettingsError: nothing scores the answers, two terms have one name, or a term cannot be made.
        DataError: a prompt has nothing to be judged by, or a reference that its verifier cannot use.
        RewardError: code is to be run, and this machine has no sandbox for it.
    """
    verifier = _verifier(settings, prompts)
    terms = terms_of(settings.rewards, "rewards", folder / CACHE)
    _refuse_names(terms, (MODEL, VERIFIER), "rewards")
    facts: dict[str, str] = {}
    if verifier is not None:
        uses_tests = any(verifier.of(p.reference) == "tests" for p in prompts)
        if uses_tests:
            facts["sandbox"] = isolation()
        terms.insert(0, Term(VERIFIER, settings.verifier_weight, verifier, waits=uses_tests))
    if judge is not None:
        terms.insert(0, Term(MODEL, 1.0, judge()))
    return Combined(terms, max_failed=settings.max_failed, facts=facts)


def gold_of(settings: RolloutSettings, folder: Path, *, judge: Callable[[], Reward] | None = None) -> Combined | None:
    """What held-out answers are measured with and nothing is trained on; None if there is no such term.

    Args:
        folder: of the stage.
        judge: loads the reward model that is only measured; None: there is none.

    Raises:
        SettingsError: as `rewards_of`.
    """
    terms = terms_of(settings.eval_rewards, "eval_rewards", folder / CACHE)
    if judge is not None:
        _refuse_names(terms, (MODEL,), "eval_rewards")
        terms.insert(0, Term(MODEL, 1.0, judge()))
    return Combined(terms, max_failed=settings.max_failed) if terms else None


def _refuse_names(terms: Sequence[Term], kept: Sequence[str], field: str) -> None:
    """Raises SettingsError where a term is called as what stands beside the list."""
    taken = [t.name for t in terms if t.name in kept]
    if taken:
        raise SettingsError(
            f"'{taken[0]}' is the name of what is not in this list", field=field, hint="give the term another name"
        )


def terms_of(terms: Sequence[config.Term], field: str, cache: Path) -> list[Term]:
    """The terms of a list in the settings.

    Args:
        field: the list's name, for errors.
        cache: folder for what servers answered.

    Raises:
        SettingsError: two terms have one name, or a term cannot be made.
    """
    seen: Counter[str] = Counter()
    made: list[Term] = []
    for index, term in enumerate(terms):
        seen[term.kind] += 1
        name = term.name or (term.kind if seen[term.kind] == 1 else f"{term.kind}{seen[term.kind]}")
        if name in [t.name for t in made] or name == "failed":
            raise SettingsError(
                f"'{name}' is taken: a metric `reward_{name}` would mean two things",
                field=f"{field}.{index}.name",
                hint="give the term another name",
            )
        made.append(_term(name, term, f"{field}.{index}", cache / name))
    return made


def _term(name: str, term: config.Term, field: str, cache: Path) -> Term:
    if isinstance(term, config.JudgeTerm):
        return Term(name, term.weight, JudgeReward(name, term, field, cache if term.cache else None), waits=True)
    if isinstance(term, config.HttpTerm):
        return Term(name, term.weight, HttpReward(name, term, field, cache if term.cache else None), waits=True)
    if isinstance(term, config.PythonTerm):
        function = load_function(term.function, f"{field}.function")
        return Term(name, term.weight, FunctionReward(name, term.function, function, term.options))
    if isinstance(term, config.LengthTerm):
        return Term(name, term.weight, RuleReward(name, length_of(term)))
    if isinstance(term, config.RepetitionTerm):
        return Term(name, term.weight, RuleReward(name, repetition_of(term)))
    return Term(name, term.weight, RuleReward(name, format_of(term, field)))


def _verifier(settings: RolloutSettings, prompts: Sequence[EncodedPrompt]) -> Verifier | None:
    """The verifier, if any prompt has something to verify by."""
    limits = Limits(settings.sandbox.timeout, settings.sandbox.memory_mb)
    verifier = Verifier(settings.verifier, limits)
    names = [verifier.of(p.reference) for p in prompts] if settings.verifier != "none" else []
    unknown = sorted(set(names) - {"", *VERIFIERS})
    if unknown:
        raise DataError(
            f"prompts want the verifier '{unknown[0]}', which does not exist",
            field="verifier",
            hint=f"known: {', '.join(VERIFIERS)}",
        )
    for name, prompt in zip(names, prompts, strict=False):
        fault = verifier.fault(prompt.reference) if name else None
        if fault:
            asked = " ".join(str(prompt.messages[-1]["content"]).split())
            raise DataError(
                f"{fault}; the prompt: {asked[:60]!r}", field="reference", hint="correct or leave out this row"
            )
    if not as_models(settings.reward_model) and not settings.rewards:
        if not any(names):
            raise SettingsError(
                "nothing scores the answers: there is no reward model, and no prompt has a reference to verify by",
                field="reward_model",
                hint='train one with `danlu reward`, give `rewards`, or prompts like {"prompt": [...], "reference": '
                '{"verifier": "number", "answer": "72"}}',
            )
        if not all(names):
            raise DataError(
                f"{names.count('')} of {len(names)} prompts have no reference to verify by, and there is no reward model",
                field="reference",
                hint="leave these prompts out, or give --reward-model",
            )
    return verifier if any(names) else None
