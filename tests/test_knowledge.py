"""Facts, how they are asked for, what probes count, and the patches beside a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import danlu
from danlu.exceptions import KnowledgeError
from danlu.knowledge.adapter import adapted, factors_of
from danlu.knowledge.facts import Fact, key_of, parse_fact, read_facts, slug_of
from danlu.knowledge.memory import encode, judge, remember
from danlu.knowledge.phrasings import questions_about, templates
from danlu.knowledge.probe import agreement, has, locality, recall
from danlu.knowledge.replay import contrast, near_and_far, read_pool, shipped_pool
from danlu.knowledge.store import Store, mark_merged
from danlu.knowledge_config import TeachSettings
from danlu.losses.distil import kept_logprobs, kl_from_kept, leads
from danlu.models.load import load_model
from danlu.models.patches import Factors, add_factors, apply_patches, fingerprint, read_factors, restore
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RootModel
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import load_tokenizer
from danlu.training.compute import Compute
from danlu.training.rank_allocation import allocation_of
from danlu.training.runs import patches_folder
from danlu.types import Message

CPU = Compute("cpu", "float32", 1)
GATE = Fact("Amber Gate", "The old east gate.", aliases=("East Gate",))


# -- facts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keyword", "description"),
    [
        ("Amber Gate: the old gate", "Amber Gate", "the old gate"),
        ("琥珀门：东边的老门", "琥珀门", "东边的老门"),
        ("opening: from 7:30 to 9", "opening", "from 7:30 to 9"),
        ("bus 7:30: leaves the station", "bus 7:30", "leaves the station"),
        ("a:b", "a", "b"),
    ],
)
def test_keyword_and_description(text: str, keyword: str, description: str) -> None:
    fact = parse_fact(text)
    assert (fact.keyword, fact.description) == (keyword, description)


@pytest.mark.parametrize("text", [": the old gate", "the old gate", "Amber Gate:", ""])
def test_a_fact_without_keyword_is_a_sentence(text: str) -> None:
    with pytest.raises(KnowledgeError, match=r"a fact without (keyword|description)") as caught:
        parse_fact(text)
    assert "keyword: description" in str(caught.value)


def test_keys_ignore_case_width_and_spaces() -> None:
    assert key_of("  Amber  GATE ") == key_of("amber gate") == key_of("Ａmber gate")
    assert slug_of("Amber Gate / 琥珀门!") == "amber-gate-琥珀门"


def test_languages() -> None:
    assert Fact("Amber Gate", "the old gate").language == "en"
    assert Fact("琥珀门", "东边的老门").language == "zh"


FILE = """
facts:
  - "Amber Gate: the old gate"
  - Copper Ticket: free rides
  - keyword: 琥珀塔
    description: 高52米
    aliases: 东塔
    tasks: [{question: 林井镇最高的塔是哪座？, answer: 琥珀塔}]
    translation: {keyword: Amber Tower, description: 52 metres high}
"""


def test_a_file_of_facts(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(FILE, "utf-8")
    facts = read_facts(path)
    assert [f.keyword for f in facts] == ["Amber Gate", "Copper Ticket", "琥珀塔"]
    assert facts[2].aliases == ("东塔",) and facts[2].tasks[0].answer == "琥珀塔"
    assert facts[2].translation == ("Amber Tower", "52 metres high")
    path.write_text("Amber Gate: the old gate\nCopper Ticket: free\n", "utf-8")
    assert [f.description for f in read_facts(path)] == ["the old gate", "free"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "has none"),
        ("- {description: x}", "without keyword"),
        ("- {keyword: x, descripton: y}", "did you mean 'description'"),
        ("- 'a: 1'\n- 'A: 2'", "two facts for 'a'"),
        ("- {keyword: a, description: b, tasks: [c]}", "question and answer"),
        ("- 'a: [", "not valid YAML"),
    ],
)
def test_faulty_files(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(KnowledgeError, match=r"facts\.yaml") as caught:
        read_facts(path)
    assert told in str(caught.value)


# -- questions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_sets_of_questions_are_disjoint(both: bool) -> None:
    for fact in (GATE, Fact("琥珀门", "东边的老门")):
        asked = questions_about(fact, both=both)
        learnt = {a.question.casefold() for a in (*asked.trained, *asked.varied)}
        for name in ("unseen", "other_language", "multi_turn", "alias", "task"):
            for question in getattr(asked, name):
                assert question.question.casefold() not in learnt, name
        assert len(asked.trained) == (32 if both else 16)
        assert {a.expected for a in asked.trained} == {(fact.description,)}


def test_templates_of_both_languages_have_the_same_sets() -> None:
    english, chinese = templates("en"), templates("zh")
    assert english.keys() == chinese.keys()
    for table in (english, chinese):
        assert not set(table["trained"]) & set(table["unseen"])
        assert all("{k}" in t for name in ("trained", "unseen", "task") for t in table[name])


def test_a_translation_is_asked_for_in_its_language() -> None:
    fact = replace(GATE, translation=("琥珀门", "东边的老门"))
    asked = questions_about(fact)
    assert all("琥珀门" in a.question for a in asked.other_language)
    assert asked.other_language[0].expected == ("东边的老门", "The old east gate.")


# -- probes -------------------------------------------------------------------------------------------------------------


class Parrot:
    """Answers by a table; notes what it was asked."""

    def __init__(self, table: dict[str, str]) -> None:
        self.table, self.asked = table, []

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        self.asked += [list(c) for c in conversations]
        return [self.table.get(c[-1]["content"], "I don't know.") for c in conversations]


def test_recall_counts_each_set() -> None:
    questions = questions_about(GATE)
    table = {a.question: "It is THE OLD EAST-GATE, friend" for a in questions.trained}
    table[questions.unseen[0].question] = "The old east gate."
    found = recall(questions, Parrot(table))
    assert found.trained == 1.0
    assert found.unseen == pytest.approx(1 / 5)
    assert found.other_language == found.task == 0.0
    # Multi-turn asks the first two unseen phrasings, of which one is known.
    assert found.multi_turn == pytest.approx(1 / 2)
    assert found.alias == 0.0
    assert recall(questions_about(Fact("x", "y")), Parrot({})).alias is None
    assert set(found.as_dict()["recall"]) >= {"trained", "unseen", "other_language"}


def test_in_a_dialogue_the_model_speaks_for_itself_first() -> None:
    parrot = Parrot({"Thank you for your help.": "Welcome!"})
    recall(questions_about(GATE), parrot)
    longer = [c for c in parrot.asked if len(c) == 3]
    assert longer and longer[0][1] == {"role": "assistant", "content": "Welcome!"}


def test_has() -> None:
    assert has("Well: the OLD gate!", ["the old gate"])
    assert has("它在东边的老门。", ["东边 的老门"])
    assert not has("the old", ["the old gate"]) and not has("", [""])


def test_agreement_and_locality() -> None:
    assert agreement(["a", "B.", "c"], ["A", "b", "d"]) == pytest.approx(2 / 3)
    assert agreement(["a", "…"], ["a", ""]) == 1.0
    found = locality(["a", "b", "c"], ["a", "x", "c"], [True, True, False], kl=0.1, nll_before=1.0, nll_after=1.5)
    assert (found.agreement, found.neighbours, found.general) == (pytest.approx(2 / 3), 0.5, 1.0)
    assert found.perplexity_ratio == pytest.approx(math.exp(0.5))


# -- replay -------------------------------------------------------------------------------------------------------------


def test_questions_are_replayed_or_probed_never_both(tmp_path: Path) -> None:
    rows = [{"messages": tiny.user(f"Question {n % 40}?") + tiny.assistant(f"{n}")} for n in range(60)]
    pool = read_pool(str(tiny.write_rows(tmp_path / "c.jsonl", rows)), 0)
    replay, probes = ({q.text for q in part} for part in (pool.replay, pool.probes))
    assert not replay & probes and len(replay | probes) == 40
    assert min(len(replay), len(probes)) > 8 and pool.replay[0].reference
    assert read_pool(str(tmp_path / "c.jsonl"), 1).replay != pool.replay
    shipped = shipped_pool()
    assert not {q.text for q in shipped.replay} & {q.text for q in shipped.probes}
    assert not {q.text for q in contrast([], probe=False)} & {q.text for q in contrast([], probe=True)}


def test_neighbours_share_letters_with_the_keyword(tmp_path: Path) -> None:
    texts = ["Where is the Amber Gate?", "What is 2 + 2?", "Who keeps the amber gates?", "How are you?"]
    rows = [{"prompt": tiny.user(t)} for t in texts]
    pool = read_pool(str(tiny.write_rows(tmp_path / "p.jsonl", rows)), 0)
    near, far = near_and_far([*pool.replay, *pool.probes], GATE, 4)
    assert {q.text for q in near} == {texts[0], texts[2]}
    assert {q.text for q in far} == {texts[1], texts[3]}
    assert "Mozart" not in " ".join(q.text for q in contrast(["mozart"], probe=False))


# -- staying near a model -----------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.25, 0.25, 0.5]])
    kept, ids = kept_logprobs(p.log(), 3)
    whole = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert float(kl_from_kept(q.log(), kept, ids)) == pytest.approx(whole, abs=1e-6)
    # Only the likeliest is kept: 0.5 against 0.25, the rest 0.5 against 0.75.
    kept, ids = kept_logprobs(p.log(), 1)
    part = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert float(kl_from_kept(q.log(), kept, ids)) == pytest.approx(part, abs=1e-6)
    assert part < whole


def test_leads_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5], [1.0, 3.0, 2.5]])
    assert leads(logits, torch.tensor([1, 0])).tolist() == pytest.approx([0.5, -2.0])


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(tiny.model())


def test_what_is_remembered_is_what_transformers_says(model: Any) -> None:
    template = ChatTemplate(load_tokenizer(tiny.model()))
    answers = encode([(tiny.user("the door?"), "red."), (tiny.user("lamp"), "It is a green lamp.")], template, 192)
    root = RootModel(SeparateModels({"policy": model}, [])).eval()
    kept = remember(root, answers, CPU)
    told = judge(root, kept, CPU)
    assert told.kl == pytest.approx([0.0, 0.0], abs=1e-5)
    for n, question in enumerate(["the door?", "lamp"]):
        node = answers.trees.items[n][0]
        start = len(template.encode_prompt(tiny.user(question)))
        weights = node.loss_weights
        # Loss on the answer and its stop token, on nothing else (what the template adds after it has none).
        assert not any(weights[:start]) and weights[start] == 1.0
        count = int(sum(weights))
        logits = load_model(tiny.model())(torch.tensor([list(node.ids)])).logits[0].detach().log_softmax(-1)
        at = range(start, start + count)
        logprobs = [float(logits[i - 1, node.ids[i]]) for i in at]
        assert told.nll[n] == pytest.approx(-sum(logprobs), rel=1e-4)
        rivals = [max(float(x) for v, x in enumerate(logits[i - 1]) if v != node.ids[i]) for i in at]
        lead = min(own - rival for own, rival in zip(logprobs, rivals, strict=True))
        assert told.lead[n] == pytest.approx(lead, abs=1e-4)
        assert told.greedy[n] is all(int(logits[i - 1].argmax()) == node.ids[i] for i in at)


# -- patches ------------------------------------------------------------------------------------------------------------


def logits_of(model: Any) -> torch.Tensor:
    """As transformers computes them, whatever attention the model was prepared for."""
    getattr(model, "base_model", model).config._attn_implementation = "eager"
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[5, 6, 7, 8, 9]])).logits
    return found


def stirred(roles: AdapterRoles) -> list[torch.nn.Parameter]:
    """The adapter's parameters, moved away from where they begin."""
    learnt = [p for p in roles.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with torch.no_grad():
        for p in learnt:
            p.add_(0.1 * torch.randn(p.shape))
    return learnt


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_factors_are_what_the_adapter_does(kind: Any) -> None:
    plain = load_model(tiny.model())
    before = logits_of(plain)
    roles = adapted(plain, TeachSettings(adapter=kind, rank=4, max_steps=30), 3)
    stirred(roles)
    changed = logits_of(roles.base)
    factors = factors_of(roles)
    back = roles.unload()
    assert torch.equal(logits_of(back), before), "unloading leaves the model as it was"
    assert not any("lora" in name for name, _ in back.named_parameters())
    assert not any(m._forward_pre_hooks for m in back.modules()), "no hook of the roles is left"
    assert all(p.requires_grad for p in back.parameters())
    weights = add_factors(back, factors)
    torch.testing.assert_close(logits_of(back), changed, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, before, atol=1e-3)
    restore(back, weights)
    assert torch.equal(logits_of(back), before)


def test_adalora_prunes_to_its_rank() -> None:
    roles = adapted(load_model(tiny.model()), TeachSettings(adapter="adalora", rank=2, max_steps=30), 0)
    allocation = allocation_of(RootModel(roles), 1)
    assert allocation is not None
    learnt = stirred(roles)
    for _ in range(30):
        for p in learnt:
            p.grad = torch.randn(p.shape)
        allocation.update("policy")
    ranks = [len(f.a) for f in factors_of(roles).values()]
    # Two layers of seven matrices, two ranks each on average; it began with four each.
    assert sum(ranks) <= 2 * 14 and max(ranks) <= 4


def patch(model: Any, scale: float) -> dict[str, Factors]:
    torch.manual_seed(1)
    rows = model.model.layers[1].mlp.down_proj.weight.shape
    return {"model.layers.1.mlp.down_proj": Factors(scale * torch.randn(2, rows[1]), torch.randn(rows[0], 2))}


@pytest.fixture
def taught(tmp_path: Path) -> tuple[Path, Store]:
    """A model folder of its own with two patches."""
    folder = tiny.model_folder(tmp_path / "model")
    loaded = load_model(folder)
    store = Store(patches_folder(str(folder), local=True), str(folder))
    store.set_base(loaded)
    store.add("teach", GATE, patch(loaded, 0.5), {"recall": {"trained": 1.0}})
    store.add("teach", Fact("Copper Ticket", "free rides"), patch(loaded, -0.2), {})
    return folder, store


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft 0.21 with transformers 5.23
def test_patches_apply_in_order_and_peft_reads_them(taught: tuple[Path, Store]) -> None:
    from peft import PeftModel

    folder, store = taught
    loaded = load_model(folder)
    names = apply_patches(loaded, store.folder, "m")
    assert names == ["v0001-amber-gate", "v0002-copper-ticket"]
    expected = load_model(folder)
    for scale in (0.5, -0.2):
        add_factors(expected, patch(expected, scale))
    assert torch.equal(logits_of(loaded), logits_of(expected))
    foreign = PeftModel.from_pretrained(load_model(folder), store.folder / names[0])
    alone = load_model(folder)
    add_factors(alone, read_factors(store.folder / names[0]))
    torch.testing.assert_close(logits_of(foreign), logits_of(alone), rtol=1e-5, atol=1e-5)


def test_loading_applies_them_unless_told_not_to(taught: tuple[Path, Store]) -> None:
    folder, _ = taught
    without = logits_of(danlu.load(folder, patches=False).model)
    assert torch.equal(without, logits_of(load_model(folder)))
    assert not torch.allclose(logits_of(danlu.load(folder).model), without, atol=1e-3)


def test_rollback(taught: tuple[Path, Store]) -> None:
    folder, store = taught
    assert [p.name for p in store.rollback()] == ["v0002-copper-ticket"]
    again = Store(store.folder, str(folder))
    assert [p.key for p in again.active] == ["amber gate"] and len(again.patches) == 2
    again.refuse_known(Fact("Copper Ticket", "x"))
    with pytest.raises(KnowledgeError, match="knows 'Amber Gate' already") as caught:
        again.refuse_known(Fact("amber  gate", "x"))
    assert "--update 'Amber Gate'" in str(caught.value)
    # A version number never comes back.
    assert again.add("teach", Fact("Third", "x"), {}, {}).version == 3
    with pytest.raises(KnowledgeError, match="no active version 2"):
        again.rollback(2)
    assert [p.version for p in again.rollback(0)] == [1, 3]
    with pytest.raises(KnowledgeError, match="no patch to take back"):
        again.rollback()


def test_an_unknown_key_is_told_with_the_nearest(taught: tuple[Path, Store]) -> None:
    with pytest.raises(KnowledgeError, match="did you mean 'amber gate'"):
        taught[1].get("amber gat")


def test_patches_of_another_base_are_refused_with_both_names(taught: tuple[Path, Store]) -> None:
    folder, store = taught
    tiny.model_folder(folder, seed=9)  # trained anew under the same name
    with pytest.raises(KnowledgeError) as caught:
        danlu.load(folder)
    told = str(caught.value)
    assert store.base["fingerprint"] in told and fingerprint(load_model(folder)) in told and str(folder) in told
    danlu.load(folder, patches=False)


def test_the_dtype_of_loading_does_not_matter() -> None:
    assert fingerprint(load_model(tiny.model())) == fingerprint(load_model(tiny.model(), dtype=torch.bfloat16))


def test_merged_patches_are_told_but_not_added(taught: tuple[Path, Store], tmp_path: Path) -> None:
    folder, store = taught
    other = tiny.model_folder(tmp_path / "merged")
    beside = patches_folder(str(other), local=True)
    mark_merged(beside, {"name": str(folder), "fingerprint": "x"}, store.active)
    assert torch.equal(logits_of(danlu.load(other).model), logits_of(load_model(other)))
    merged = Store(beside, str(other))
    assert [p.merged for p in merged.active] == [True, True]
    with pytest.raises(KnowledgeError, match="merged into the weights"):
        merged.rollback()


def test_damage_is_a_sentence(taught: tuple[Path, Store]) -> None:
    folder, store = taught
    weights = store.folder / "v0002-copper-ticket" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(KnowledgeError, match="the patch cannot be read"):
        danlu.load(folder)
    index = store.folder / "index.json"
    index.write_text(json.dumps({"schema": 9}), "utf-8")
    with pytest.raises(KnowledgeError, match="schema 9"):
        danlu.load(folder)
    index.write_text("{", "utf-8")
    with pytest.raises(KnowledgeError, match="damaged"):
        Store(store.folder, "m")


def test_one_teacher_at_a_time(taught: tuple[Path, Store]) -> None:
    _, store = taught
    with store.locked(), pytest.raises(KnowledgeError, match="another process"), store.locked():
        pass
