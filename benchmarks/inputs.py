"""What every side is given: one tokenizer, the same weights, the same real rows, and the rows' token ids.

Rows are Alpaca's (conversations) and HH-RLHF's (comparisons, prompts) that fit the limits whole, in the files' order. danlu reads
the records; peers get the ids that danlu's chat template makes of them, so that both sides train the very same tokens.
"""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from danlu.data.collate import encode_comparisons, encode_conversations
from danlu.data.read import read
from danlu.models.load import load_model, save_model
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.models.starters import starter
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import train_tokenizer
from danlu.tree import TreeBatch, conversation

ALPACA, HH = "alpaca-en/alpaca_data.json.gz", "hh-rlhf/helpful-base/train.jsonl.gz"
VOCABULARY, MAX_LENGTH, ROWS = 8192, 512, 2000
MAX_PROMPT, MAX_ANSWER = 256, 128
SIZES: dict[str, dict[str, int]] = {
    "7M": {"hidden_size": 320, "layers": 4, "heads": 10, "kv_heads": 5, "context": 1024},
    "60M": {"hidden_size": 768, "layers": 8, "heads": 12, "kv_heads": 6, "context": 1024},
    "0.5B": {"hidden_size": 1280, "layers": 28, "heads": 20, "kv_heads": 4, "context": 1024},
}
MEAN_ANSWER = 40  # tokens after which the model of the roll-outs stops, on average


@dataclass(frozen=True)
class Rows:
    """Records as danlu reads them, and the same as token ids."""

    records: list[dict[str, Any]]
    ids: list[dict[str, Any]]

    def write(self, path: Path, start: int, count: int) -> str:
        """Some rows as `path` (JSON Lines) and `path.ids.json`; returns `path`."""
        chosen = slice(start, start + count)
        assert len(self.records[chosen]) == count, f"only {len(self.records)} rows"
        path.write_text("".join(json.dumps(r) + "\n" for r in self.records[chosen]), "utf-8")
        Path(f"{path}.ids.json").write_text(json.dumps(self.ids[chosen]), "utf-8")
        return str(path)


@dataclass(frozen=True)
class Inputs:
    """`conversations`: Alpaca; `comparisons`: HH pairs; `prompts`: HH prompts with the length of their real answer."""

    folder: Path
    tokenizer: Any
    template: ChatTemplate
    conversations: Rows
    comparisons: Rows
    prompts: Rows

    def models(self, size: str) -> Path:
        """Folders `lm`, `reward`, `value-head` (LLaMA-Factory's form of `reward`) and `stopping` of a size."""
        folder = self.folder / size
        if not folder.is_dir():
            _write_models(folder, size, self)
        return folder


def prepare(data: Path, folder: Path) -> Inputs:
    """Reads the rows, trains the tokenizer on them, writes what sides share into `folder`."""
    alpaca, hh = folder / "alpaca.json", folder / "hh.jsonl"
    alpaca.write_text(json.dumps(json.loads(gzip.decompress((data / ALPACA).read_bytes()))[:ROWS]), "utf-8")
    with gzip.open(data / HH, "rt", encoding="utf-8") as lines:
        hh.write_text("".join(itertools.islice(lines, ROWS)), "utf-8")
    talks = list(read(alpaca, "conversation").records)
    pairs = list(read(hh, "comparison").records)
    texts = [m["content"] for r in talks for m in r.messages]  # type: ignore[union-attr]
    texts += [m["content"] for r in pairs for m in [*r.prompt, *r.chosen]]  # type: ignore[union-attr]
    template = ChatTemplate(train_tokenizer(texts, VOCABULARY, context=1024), "chatml")
    template.tokenizer.save_pretrained(folder / "tokenizer")
    return Inputs(folder, template.tokenizer, template, *_rows(talks, pairs, template))


def _rows(talks: list[Any], pairs: list[Any], template: ChatTemplate) -> tuple[Rows, Rows, Rows]:
    conversations, comparisons, prompts = Rows([], []), Rows([], []), Rows([], [])
    for record in talks:
        found = encode_conversations([record], template, MAX_LENGTH)
        if len(found.items) == 1 and not found.answers_cut:
            (node,) = found.items[0]
            labels = [i if w else -100 for i, w in zip(node.ids, node.loss_weights, strict=True)]
            conversations.records.append({"messages": record.messages})
            conversations.ids.append({"input_ids": list(node.ids), "labels": labels})
    for record in pairs:
        found = encode_comparisons([record], template, MAX_LENGTH)
        if len(found.items) != 1 or found.answers_cut:
            continue
        prompt, chosen, rejected = (list(node.ids) for node in found.items[0])
        comparisons.records.append({k: v for k, v in asdict(record).items() if k in ("prompt", "chosen", "rejected")})
        comparisons.ids.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        if len(prompt) <= MAX_PROMPT:
            prompts.records.append({"prompt": record.prompt})
            prompts.ids.append({"prompt": prompt, "answer": chosen[:MAX_ANSWER]})
    return conversations, comparisons, prompts


def _write_models(folder: Path, size: str, inputs: Inputs) -> None:
    tokenizer = inputs.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = starter(len(tokenizer), **SIZES[size], seed=0, ids=ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # whoever loads them in bf16 loads the same weights
    model.generation_config.do_sample = True
    save_model(model, tokenizer, folder / "lm")
    _write_reward(folder, tokenizer)
    if size != "0.5B":
        save_model(_stopping(model, inputs), tokenizer, folder / "stopping")


def _write_reward(folder: Path, tokenizer: Any) -> None:
    """The same trunk with a head that is not zero."""
    model = load_model(folder / "lm", scalar=True)
    head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(1)).mul_(0.05).bfloat16()
    with torch.no_grad():
        model.score.weight.copy_(head)
    model.config.pad_token_id = tokenizer.pad_token_id
    save_model(model, tokenizer, folder / "reward")
    other = load_model(folder / "lm")
    other.config.summary_dropout_prob = 0.0
    save_model(other, tokenizer, folder / "value-head")
    state = {"v_head.summary.weight": head.float(), "v_head.summary.bias": torch.zeros(1)}
    save_file(state, folder / "value-head" / "value_head.safetensors")


@torch.no_grad()
def _stopping(model: Any, inputs: Inputs) -> Any:
    """The model, changed so that it stops after any token with probability 1 / MEAN_ANSWER: answers are ragged, as real ones are.

    The first entry of the residual stream becomes a constant, which only the stop token's row of the head reads.
    """
    embedding = model.get_input_embeddings().weight
    embedding[:, 0] = 0.05
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    rows = inputs.prompts.ids[:16]
    tree = TreeBatch.of([conversation(r["prompt"], [0.0] * len(r["prompt"]))[0] for r in rows])
    root = RootModel(SeparateModels({"policy": model}, []))
    constant = root(tree, "policy", lambda out: float(out.hidden_TD[out.tree.node_end_N - 1, 0].mean()))
    others = torch.tensor(float(len(embedding))).log() - torch.tensor(float(MEAN_ANSWER - 1)).log()
    embedding[model.config.eos_token_id, 0] += others / constant
    return model
