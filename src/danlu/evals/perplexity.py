"""Perplexity on documents or conversations: exp of the mean loss per token (answers and stop tokens only for conversations)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from danlu.data.collate import Trees, encode_conversations, encode_documents
from danlu.data.pairs import encode_pairs
from danlu.data.sources import read_sources
from danlu.exceptions import DataError
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.models.seq2seq import PairBatch, start_id, target_logprobs
from danlu.text.chat_template import ChatTemplate
from danlu.text.text_to_text import TextToText
from danlu.train_config import Sources
from danlu.training.compute import Compute
from danlu.training.step import heldout_loss
from danlu.types import Document

MICRO_TOKENS = 4096


def encode(
    data: Sources, tokenizer: Any, max_length: int, limit: int | None = None, max_tokens: int | None = None
) -> Trees:
    """A file of documents or conversations as trees; what it holds is found out by its content.

    Args:
        limit: use the first so many records.
        max_tokens: use the first so many tokens (whole trees, at least one).
    """
    try:
        records = read_sources(data, "conversation").records[:limit]
        trees = encode_conversations(records, ChatTemplate(tokenizer), max_length)  # type: ignore[arg-type]
    except DataError as conversation_error:
        try:
            documents = read_sources(data, "document").records[:limit]
        except DataError:
            raise conversation_error from None
        trees = encode_documents(documents, tokenizer, max_length)  # type: ignore[arg-type]
    if max_tokens is None:
        return trees
    used = list(accumulate(trees.lengths))
    return replace(trees, items=trees.items[: max(1, sum(total <= max_tokens for total in used))])


def measure(model: Any, data: Sources, tokenizer: Any, max_length: int, limit: int | None = None) -> tuple[float, int]:
    """Perplexity of a model on a file, and the tokens it is the mean of.

    An encoder-decoder reads what was said before each answer of a conversation and is measured on the answer.
    """
    if not model.config.is_encoder_decoder:
        trees = encode(data, tokenizer, max_length, limit)
        return perplexity(model, trees), int(trees.weights.sum())
    records = read_sources(data, "conversation").records[:limit]
    pairs = encode_pairs(records, TextToText(tokenizer), max_length)  # type: ignore[arg-type]
    start, total = start_id(model), 0.0
    with torch.no_grad():
        for pair in pairs.items:
            total -= float(target_logprobs(model, PairBatch.of([pair], start).to(model.device)).sum())
    tokens = int(pairs.weights.sum())
    return math.exp(total / max(tokens, 1)), tokens


def characters(data: Sources, limit: int | None = None) -> int:
    """Characters of a file of documents; 0 for one of conversations.

    Perplexity per character, `perplexity ** (tokens / characters)`, can be compared between tokenizers.
    """
    try:
        read_sources(data, "conversation")
    except DataError:
        records = read_sources(data, "document").records[:limit]
        return sum(len(r.text) for r in records if isinstance(r, Document))
    return 0


def per_character(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> float:
    """exp(-log p(texts) / characters) of a decoder: comparable between models with different tokenizers."""
    trees = encode_documents([Document(text) for text in texts], tokenizer, max_length)
    return float(perplexity(model, trees) ** (float(trees.weights.sum()) / max(sum(map(len, texts)), 1)))


def perplexity(model: Any, trees: Trees) -> float:
    """Perplexity in fp32 on this model's device."""
    roles = SeparateModels({"policy": model}, [])
    compute = Compute(str(model.device), "float32", 0)
    return math.exp(heldout_loss(RootModel(roles).eval(), trees, MICRO_TOKENS, compute))
