"""Objectives that corrupt a text and predict what is missing: rows of GLM, UniLM and T5, made anew in every pass.

What becomes of a text is a function of (seed, step, its number), so a resumed run sees the same rows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu.config import PretrainSettings
from danlu.data.blanks import SENTENCE_ENDS, BlankMix, BlankRow, PieceIds, build, suffix
from danlu.data.masking import MaskRow, target_row, unilm_row
from danlu.data.spans import SpanRow, corrupt
from danlu.exceptions import ModelError
from danlu.generation.seeds import mix_seed
from danlu.losses.logprobs import weighted_nll
from danlu.models.blank import visible_prefix
from danlu.models.rows import RowBatch, RowsOutput, RowsRoot
from danlu.training.compute import Compute
from danlu.training.sharding import share_forwards
from danlu.training.step import shortest_first

TRIES = 5
HELDOUT = 1 << 40  # the step of held-out texts: they are corrupted once for all
BLANK_TOKENS = ("[MASK]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>", "[dBLOCK]")
SENTINELS = 100
SPELLINGS = ("<extra_id_{}>", "\u2581<extra_id_{}>", "<s_{}>")


@dataclass(frozen=True)
class Text:
    """A window of a document, or (prompt > 0) a prompt with its answer and the end behind it: their ids."""

    ids: Sequence[int]
    prompt: int = 0


@dataclass(frozen=True)
class Texts:
    """Items of an objective. `make`: (texts, one source of randomness for each) -> rows."""

    items: Sequence[Text]
    make: Callable[[Sequence[Text], Sequence[random.Random]], RowBatch]
    seed: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each item before it is corrupted."""
        return np.array([len(item.ids) for item in self.items], dtype=np.int64)

    def batch(self, indices: Sequence[int], step: int) -> RowBatch:
        """The rows of some items in a step."""
        sources = [random.Random(mix_seed(self.seed, 0xDE, step, index)) for index in indices]
        return self.make([self.items[i] for i in indices], sources)


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """`[B, T]`, filled up on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)


def targets_of(targets: Sequence[Sequence[int]], loss: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Targets and loss weights of all places of a batch, flat."""
    return padded(targets).flatten(), padded(loss).flatten().float()


# -- GLM ----------------------------------------------------------------------------------------------------------------


def piece_ids(tokenizer: Any) -> PieceIds:
    """The tokens of blank infilling, found by their names in a tokenizer (both published spellings of sop and eop).

    Raises:
        ModelError: one of them is missing.
    """
    known = tokenizer.get_vocab()

    def find(*names: str) -> int:
        for name in names:
            if name in known:
                return int(known[name])
        raise ModelError(f"the tokenizer has no {names[0]}", hint="objective glm needs " + ", ".join(BLANK_TOKENS))

    mask = find("[MASK]")
    start = known.get("[CLS]", known.get("<ENC>", tokenizer.bos_token_id))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>") if "<|endoftext|>" in known else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return PieceIds(
        mask=mask,
        sentence_mask=int(known.get("[sMASK]", mask)),
        document_mask=int(known.get("[gMASK]", mask)),
        sop=find("<|startofpiece|>", "<sop>", "sop"),
        eop=find("<|endofpiece|>", "<eop>", "eop"),
        eos=int(end),
        pad=int(pad),
        cls=int(start) if start is not None and start != end else None,
        blocked=known.get("[dBLOCK]", known.get("<dBLOCK>")),
    )


def sentence_ends(tokenizer: Any) -> Callable[[int], bool]:
    """Whether a token's text has a mark that ends a sentence."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    found = {i for i, text in enumerate(texts) if any(mark in text for mark in SENTENCE_ENDS)}
    special = set(tokenizer.all_special_ids)
    return (found - special).__contains__


def blank_rows(
    model_config: Any, tokenizer: Any, mix: BlankMix, max_length: int
) -> Callable[[Sequence[Text], Sequence[random.Random]], RowBatch]:
    """Texts to GLM's rows; a prompt's answer is a blank behind it (multi-task instruction pre-training, Zeng et al. 2023)."""
    ids, ends = piece_ids(tokenizer), sentence_ends(tokenizer)
    generic = ids.document_mask

    def row_of(text: Text, rng: random.Random) -> BlankRow:
        if text.prompt:
            return suffix(text.ids, text.prompt, ids, "document", generic)
        whole = list(text.ids)
        for _ in range(TRIES if len(whole) > 3 else 0):
            rows = build([whole], ids, mix, rng, ends=_but(ends, ids.eos), max_length=max_length)
            if rows:
                return rows[0]
        return suffix(whole, max(1, len(whole) // 2), ids, "document", generic if mix.own_masks else ids.mask)

    def make(texts: Sequence[Text], sources: Sequence[random.Random]) -> RowBatch:
        return blank_batch([row_of(t, r) for t, r in zip(texts, sources, strict=True)], model_config, ids)

    return make


def _but(ends: Callable[[int], bool], token: int) -> Callable[[int], bool]:
    return lambda found: found != token and ends(found)


def blank_batch(rows: Sequence[BlankRow], config: Any, ids: PieceIds) -> RowBatch:
    """GLM's rows as the model's family takes them: GLM-130B has boolean masks, and one row of positions unless asked for two."""
    inputs = padded([r.ids for r in rows], ids.pad)
    places, inside = padded([r.places for r in rows]), padded([r.inside for r in rows])
    context = torch.tensor([r.context for r in rows])
    targets, loss = targets_of([r.targets for r in rows], [r.loss for r in rows])
    if getattr(config, "model_type", "") != "danlu_glm_130b":
        positions = torch.stack([places, inside], dim=1) if config.block_position_encoding else places[:, None]
        return RowBatch({"input_ids": inputs, "position_ids": positions, "attention_mask": context}, targets, loss)
    visible = visible_prefix(context, padded([[1] * len(r.ids) for r in rows]).bool())
    one = torch.where(
        (inside > 0) & (inputs == ids.document_mask).any(1, keepdim=True), context[:, None] + inside - 1, places
    )
    positions = torch.stack([places, inside], dim=1) if config.position_encoding_2d else one
    return RowBatch({"input_ids": inputs, "position_ids": positions, "attention_mask": ~visible}, targets, loss)


# -- UniLM --------------------------------------------------------------------------------------------------------------


def mask_batch(rows: Sequence[MaskRow], pad: int) -> RowBatch:
    """UniLM's rows: modes and sources say what is visible, and which segment ids there are."""
    inputs = {
        "input_ids": padded([r.ids for r in rows], pad),
        "attention_mask": padded([[1] * len(r.ids) for r in rows]),
        "modes": torch.tensor([r.mode for r in rows]),
        "sources": torch.tensor([r.source for r in rows]),
    }
    return RowBatch(inputs, *targets_of([r.targets for r in rows], [r.loss for r in rows]))


def mask_rows(model_config: Any, tokenizer: Any) -> Callable[[Sequence[Text], Sequence[random.Random]], RowBatch]:
    """Texts to UniLM's rows; of a text with a prompt the answer's tokens are masked, its stop among them."""
    mask, pad = mask_id_of(model_config), int(tokenizer.pad_token_id or 0)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    never = set(tokenizer.all_special_ids) | {mask}

    def row_of(text: Text, rng: random.Random) -> MaskRow:
        if text.prompt:
            return target_row(text.ids[: text.prompt], text.ids[text.prompt :], mask, rng)
        return unilm_row(text.ids, mask, end, len(tokenizer), rng, never=never - {text.ids[-1]})

    return lambda texts, sources: mask_batch([row_of(t, r) for t, r in zip(texts, sources, strict=True)], pad)


def mask_id_of(config: Any) -> int:
    """The mask token of a UniLM.

    Raises:
        ModelError: its configuration names none, or it is another kind of model.
    """
    found = getattr(config, "mask_token_id", None)
    if found is None or getattr(config, "model_type", "") != "danlu_unilm":
        raise ModelError("objective unilm wants a UniLM whose config.json has mask_token_id", field="model")
    return int(found)


# -- T5 -----------------------------------------------------------------------------------------------------------------


def sentinels_of(tokenizer: Any) -> list[int]:
    """Ids of the tokens that stand for spans, in order: T5's `<extra_id_0>`, ... (mT5's have a block before), CPM-2's `<s_0>`, ...

    Raises:
        ModelError: the tokenizer has none.
    """
    known = tokenizer.get_vocab()
    for name in SPELLINGS:
        found = list(
            itertools.takewhile(lambda i: i is not None, (known.get(name.format(n)) for n in itertools.count()))
        )
        if found:
            return found
    raise ModelError(
        "the tokenizer has neither <extra_id_0>, <extra_id_1>, ... nor <s_0>, <s_1>, ...",
        hint="objective t5 needs sentinel tokens",
    )


def span_batch(rows: Sequence[SpanRow], config: Any, pad: int) -> RowBatch:
    """Sources for the encoder; targets for the decoder, whose inputs are these one place later."""
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else pad
    targets, loss = targets_of([r.target for r in rows], [[1] * len(r.target) for r in rows])
    inputs = {
        "input_ids": padded([r.source for r in rows], pad),
        "attention_mask": padded([[1] * len(r.source) for r in rows]),
        "decoder_input_ids": padded([[start, *r.target[:-1]] for r in rows], pad),
    }
    return RowBatch(inputs, targets, loss)


def span_rows(model_config: Any, tokenizer: Any) -> Callable[[Sequence[Text], Sequence[random.Random]], RowBatch]:
    """Texts to T5's rows; a prompt is the source of its answer.

    Raises:
        ModelError: the model is no encoder-decoder.
    """
    if not getattr(model_config, "is_encoder_decoder", False):
        raise ModelError("objective t5 wants an encoder-decoder", field="model", hint="give a T5 or mT5 model")
    sentinels, end, pad = sentinels_of(tokenizer), int(tokenizer.eos_token_id), int(tokenizer.pad_token_id or 0)
    framing = {tokenizer.bos_token_id, tokenizer.eos_token_id}

    def row_of(text: Text, rng: random.Random) -> SpanRow:
        if text.prompt:
            return SpanRow([*text.ids[: text.prompt], end], [*text.ids[text.prompt :]])
        inner = [i for i in text.ids if i not in framing]
        return corrupt(inner if len(inner) > 1 else text.ids, sentinels, end, rng)

    return lambda texts, sources: span_batch(
        [row_of(t, r) for t, r in zip(texts, sources, strict=True)], model_config, pad
    )


# -- losses -------------------------------------------------------------------------------------------------------------


def rows_of(settings: PretrainSettings, config: Any, tokenizer: Any) -> Callable[..., RowBatch]:
    """How the settings' objective makes rows of texts."""
    if settings.objective == "glm":
        if not hasattr(config, "blank_ids"):
            raise ModelError(f"objective glm wants a GLM, not '{config.model_type}'", field="model")
        return blank_rows(config, tokenizer, BlankMix(**settings.blanks.model_dump()), settings.max_length)
    return mask_rows(config, tokenizer) if settings.objective == "unilm" else span_rows(config, tokenizer)


def rows_loss(out: RowsOutput, denominator: float) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy over the places of a batch that carry loss."""
    index = out.rows.loss_index()
    hidden, device = out.hidden_TD.index_select(0, index), out.hidden_TD.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    weight, bias = out.head_weights()
    weights = out.rows.loss_weight_R[index]
    rule = out.rule
    loss = weighted_nll(
        hidden, weight, out.rows.targets_R[index], weights, bias_V=bias, scale=rule.scale, softcap=rule.softcap
    )
    return loss / denominator, {"loss_sum": float(loss.detach())}


def heldout_rows_loss(root: RowsRoot, texts: Texts, micro_tokens: int, compute: Compute) -> float:
    """Mean loss per predicted token over held-out texts, always corrupted in the same way, in nats."""

    def sums(indices: list[int]) -> tuple[float, float]:
        batch = texts.batch(indices, HELDOUT)
        with compute.autocast():
            loss, _ = root(batch.to(compute.device), "policy", lambda out: rows_loss(out, 1.0))
        return float(loss), float(batch.loss_weight_R.sum())

    found = share_forwards(root, ["policy"], shortest_first(texts, micro_tokens), sums, compute)
    return sum(loss for loss, _ in found) / max(sum(weight for _, weight in found), 1.0)
