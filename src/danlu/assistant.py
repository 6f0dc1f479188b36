"""`danlu.load`: model, tokenizer, chat template and engine in one object."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from danlu.config import EngineSettings
from danlu.exceptions import ModelError
from danlu.generation.encoder_decoder import EncoderDecoderEngine
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import FinishReason, Request, SamplingParams, TopLogprobs, generate
from danlu.generation.speculative import drafter_of
from danlu.models.adapter_files import load_adapted, put_on, read_info, settle, tokenizer_for
from danlu.models.adapters import quantize_base
from danlu.models.fingerprint import HASH
from danlu.models.load import check_tokenizer, load_model
from danlu.models.packed_tables import pack_tables
from danlu.models.places import adapter_place, is_adapter, resolve, tokenizer_place
from danlu.models.quantize import bits_of, fetched_if_packed, is_quantized, load_in_bits, load_quantized
from danlu.models.quantized_layers import is_quantized_layer
from danlu.text.chat_template import ChatTemplate
from danlu.text.text_to_text import seam_of
from danlu.text.tokenizer import load_tokenizer
from danlu.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

History = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Reply:
    """One finished answer: its text, its ids with the stop token, and how it ended; see `Completion` for the log-probabilities."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_ids: tuple[int, ...]
    top_logprobs: tuple[TopLogprobs, ...] = ()


def _engine_of(model: Any, tokenizer: Any | None, used: EngineSettings) -> LocalEngine | EncoderDecoderEngine:
    if model.config.is_encoder_decoder:
        if used.speculate != "off":
            raise ModelError("encoder-decoders do not guess tokens ahead", hint="leave speculate off")
        return EncoderDecoderEngine(model, tokenizer, max_slots=used.slots)
    return LocalEngine(
        model,
        tokenizer,
        max_slots=used.slots,
        memory=int(used.cache_gib * 2**30) or None,
        drafter=drafter_of(used.speculate, used.guesses, model),
    )


class Assistant:
    """A loaded model that can chat.

    Attributes:
        model: the transformers model. The engine generates with these very weights.
        tokenizer: None when the folder has no tokenizer files.
        template: the chat seam; None without a tokenizer.
        engine: see `generation.protocol.Engine`.
        defaults: sampling parameters of `chat` and `generate` where none are given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None,
        *,
        name: str = "",
        defaults: SamplingParams | None = None,
        engine: EngineSettings | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        paired = bool(model.config.is_encoder_decoder)
        self.template = seam_of(tokenizer, encoder_decoder=paired) if tokenizer is not None else None
        self._settings = engine or EngineSettings()
        self.engine = _engine_of(model, tokenizer, self._settings)
        self.defaults = defaults or SamplingParams(max_new_tokens=512, temperature=0.7, top_p=0.9)

    def with_adapter(self, folder: str | Path, name: str = "") -> Assistant:
        """An assistant that answers by an adapter of this one's model; both share the model's weights in memory.

        The adapter stays beside the weights. It has an engine of its own, so both can answer at the same time.

        Args:
            folder: an adapter folder, or a run whose model is one.

        Raises:
            ModelError: the folder is none, or was trained on another model.
        """
        from danlu.training.runs import resolve_model

        place = adapter_place(resolve_model(str(folder)))
        if not is_adapter(place):
            raise ModelError(
                "this is not an adapter folder (no adapter_config.json)", file=place, hint="give out/adapter"
            )
        info = read_info(place)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        shared = copy.deepcopy(self.model, {id(t): t for t in tensors})
        model = settle(put_on(shared, info, named=self.name), info)
        where = tokenizer_place(place)
        own = load_tokenizer(where, local=Path(where).is_dir())
        return Assistant(
            model,
            own if own is not None else self.tokenizer,
            name=name or str(folder),
            defaults=self.defaults,
            engine=self._settings.model_copy(update={"speculate": "off"}),
        )

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.context

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ModelError(
                "this model folder has no tokenizer files, so it can neither read nor write text",
                file=self.name or None,
                hint="copy tokenizer.json and tokenizer_config.json of the model beside config.json",
            )
        return self.template

    def request(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Request:
        """An engine request for a conversation; the template's stop tokens are added to the parameters."""
        template = self._template()
        used = params or self.defaults
        used = replace(used, stop_ids=used.stop_ids | template.stop_ids)
        return Request(template.encode_prompt(messages), used)

    def generate(
        self,
        conversations: Sequence[Sequence[Message]] | Sequence[Message],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Reply]:
        """Answers to several conversations, together; n in a row for one whose parameters ask for n.

        Args:
            conversations: each a list of messages that ends with a user turn; one such list alone will do too.
            params: for all, or one for each.
        """
        template = self._template()
        alone = bool(conversations) and isinstance(conversations[0], Mapping)
        several: list[Any] = [conversations] if alone else list(conversations)
        each = list(params) if isinstance(params, Sequence) else [params] * len(several)
        requests = [self.request(m, p) for m, p in zip(several, each, strict=True)]
        results = iter(generate(self.engine, requests))
        replies = []
        for request in (r for r in requests for _ in range(r.params.n)):
            done = next(results)
            text = cut_at_stop(template.decode(done.ids), request.params.stop)
            replies.append(
                Reply(text, done.ids, done.logprobs, done.finish_reason, tuple(request.prompt_ids), done.top_logprobs)
            )
        return replies

    def stream(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[str]:
        """Pieces of text of one answer as they are sampled. Closing the iterator frees the engine's slot at once."""
        request = self.request(messages, params)
        request_id = self.engine.submit(request)
        try:
            yield from self.stream_request(request_id, request.params.stop)
        finally:
            self.engine.cancel(request_id)
            self.engine.result(request_id)  # the engine forgets a request when its result is taken

    def stream_request(self, request_id: str, stop: Sequence[str] = ()) -> Iterator[str]:
        """Text pieces of a submitted request: whole characters only, nothing of a stop text."""
        template = self._template()
        ids: list[int] = []
        shown = ""
        tokens = self.engine.stream(request_id)
        try:
            for token in tokens:
                ids.append(token.id)
                text = template.decode(ids, final=False)
                # A character may be cut between tokens, and the tail may become a stop text: wait for the rest.
                safe = _hold_back(cut_at_stop(text.rstrip("\ufffd"), stop), stop)
                if len(safe) > len(shown) and safe.startswith(shown):
                    yield safe[len(shown) :]
                    shown = safe
            final = cut_at_stop(template.decode(ids), stop)
            if len(final) > len(shown):
                yield final[len(shown) :]
        finally:
            tokens.close()  # type: ignore[attr-defined]

    def chat(
        self,
        query: str,
        history: History | None = None,
        *,
        system: str | None = None,
        params: SamplingParams | None = None,
    ) -> tuple[str, History]:
        """One turn: `(response, history)` with the new turn appended; the history given is not changed."""
        before = list(history or [])
        reply = self.generate([to_messages(query, before, system)], params)[0]
        return reply.text, [*before, (query, reply.text)]

    def stream_chat(
        self,
        query: str,
        history: History | None = None,
        *,
        system: str | None = None,
        params: SamplingParams | None = None,
    ) -> Iterator[tuple[str, History]]:
        """Like `chat`, yielding the growing response and the history with it."""
        before = list(history or [])
        response = ""
        for piece in self.stream(to_messages(query, before, system), params):
            response += piece
            yield response, [*before, (query, response)]


def to_messages(query: str, history: History, system: str | None = None) -> list[Message]:
    """Messages of a conversation given as question-answer pairs."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": query}]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """What stands before the first stop text."""
    places = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(places)] if places else text


def _hold_back(text: str, stop: Sequence[str]) -> str:
    longest = max(
        (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])),
        default=0,
    )
    return text[: len(text) - longest] if longest else text


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    bits: int | None = None,
    device: str | None = None,
    engine: EngineSettings | None = None,
    patches: bool = True,
) -> Assistant:
    """Loads a model folder, a hub id or a run and makes it ready to chat.

    Args:
        path: a folder, `hf:owner/name`, `runs/NAME` (its last policy) or `runs/NAME:STAGE`.
        dtype: "float32", "bfloat16" or a torch dtype. Default: bfloat16 on CUDA, float32 on a CPU; packed weights compute in
            bfloat16 on CPUs that have it, which is what makes them fast.
        bits: 8 and 4 quantise the weights while loading, and never hold them whole; None keeps what the folder holds. Embedding
            and head of what danlu quantised are kept in 8 bits.
        device: "cpu", "cuda", ... Default: CUDA if there is one.
        engine: slots, memory and speculation; None: the defaults.
        patches: whether the facts that were taught to this model (`danlu teach`) apply.

    Returns:
        An `Assistant`. Without tokenizer files `.tokenizer` is None, and `chat` says what is missing.

    Raises:
        ModelError: no such model, an incomplete one, or a setting that cannot be honoured.
        KnowledgeError: its patches are damaged or belong to another base.
    """
    from danlu.models.patches import apply_patches
    from danlu.training.runs import patches_folder, resolve_model

    folder = resolve_model(str(path))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is not known", hint=f"one of {', '.join(DTYPES)}")
    chosen = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if bits not in (None, 4, 8, 16):
        raise ModelError(f"bits={bits} is not available", hint="use 8 or 4, or 16 for unquantised weights")
    name, local = fetched_if_packed(*resolve(folder))
    adapted = local and is_adapter(name)
    packed = bits in (4, 8) or (not adapted and is_quantized(name))
    chosen = chosen or (torch.bfloat16 if place.type == "cuda" or (packed and _fast_bfloat16()) else torch.float32)
    tokenizer = tokenizer_for(name, local=local)
    taught = patches and not adapted and patches_folder(name, local=local).is_dir()
    if adapted:
        under = read_info(name).base_bits
        if bits in (4, 8) and under not in (16, bits):
            raise ModelError(
                f"this adapter was trained on a base of {under} bits, and {bits} are asked for",
                file=name,
                hint=f"--bits {under}, or --bits 16 for ordinary weights of the same values",
            )
        model = load_adapted(name, dtype=chosen, dense=bits == 16)
        if bits in (4, 8) and under == 16:
            model = quantize_base(model, bits)
    elif bits in (4, 8) and not taught:
        model = load_in_bits(name if local else folder, bits, dtype=chosen, tables=True)
    elif is_quantized(name):
        if bits == 16:
            hint = "load the model it was made from"
            raise ModelError(f"this folder holds {bits_of(name)}-bit weights only", file=name, hint=hint)
        model = load_quantized(name, dtype=chosen, tables=True)
    else:
        model = load_model(folder, dtype=chosen)
        if taught:
            apply_patches(model, patches_folder(name, local=local), str(path))
        if bits in (4, 8):
            model = quantize_base(model, bits)
    if tokenizer is not None:
        check_tokenizer(model, tokenizer, folder)
    if hasattr(model, HASH) and any(is_quantized_layer(m) for m in model.modules()):
        pack_tables(model)  # it was made small here, and not by somebody else
    return Assistant(model.to(place), tokenizer, name=str(path), engine=engine)
