"""`chat` and `stream_chat` of ChatGLM's own classes, as the published code had them.

`danlu.load(...).chat` goes through the chat seam and the engine instead, with the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from danlu.text import chatglm_text

BROKEN_ID = 5  # what is said where scores are no numbers
BROKEN_SCORE = 5e4


class InvalidScores(LogitsProcessor):  # type: ignore[misc]
    """Scores that hold NaN or infinity become 0, with `BROKEN_ID` far above the rest."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(torch.isfinite(scores).all()):
            return scores
        scores = torch.zeros_like(scores)
        scores[..., BROKEN_ID] = BROKEN_SCORE
        return scores


class ChatGLMChat:
    """ChatGLM-6B's."""

    @torch.inference_mode()
    def chat(
        self: Any,
        tokenizer: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Any = None,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """`(response, history)` with the new pair appended; other settings go to `generate`."""
        before = list(history or [])
        inputs = _first_inputs(self, tokenizer, query, before)
        settings = _settings(max_length, num_beams, do_sample, top_p, temperature, logits_processor, kwargs)
        ids = self.generate(**inputs, **settings)[0].tolist()[inputs["input_ids"].shape[1] :]
        response = self.process_response(tokenizer.decode(ids))
        return response, [*before, (query, response)]

    @torch.inference_mode()
    def stream_chat(
        self: Any,
        tokenizer: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Any = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Like `chat`, after every token."""
        before = list(history or [])
        inputs = _first_inputs(self, tokenizer, query, before)
        choose = _chooser(do_sample, top_p, temperature, logits_processor)
        for ids, _ in _steps(self, inputs, choose, _limit(inputs, max_length, kwargs), _stops(self)):
            response = self.process_response(tokenizer.decode(ids))
            yield response, [*before, (query, response)]

    def process_response(self, response: str) -> str:
        """An answer as it is shown."""
        return chatglm_text.punctuated(response)


def _first_inputs(model: Any, tokenizer: Any, query: str, history: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    found = tokenizer([chatglm_text.rounds_from_0(query, history)], return_tensors="pt")
    names = (
        list(found) if model.config.position_encoding_2d else ["input_ids"]
    )  # the tokenizer's positions have two rows
    return {name: found[name].to(model.device) for name in names}


class ChatGLM2Chat:
    """ChatGLM2-6B's, and with a tokenizer that has tokens of roles ChatGLM3-6B's."""

    @torch.inference_mode()
    def chat(
        self: Any,
        tokenizer: Any,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        max_length: int = 8192,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, list[Any]]:
        """`(response, history)` with the new turns appended; other settings go to `generate`.

        ChatGLM3 ends an answer with a token of the next role; as in the original, the last generated token is taken for that.

        Args:
            history: pairs of question and answer; for ChatGLM3 turns `{"role", "content"}`.
            role: of the query, for ChatGLM3: "user", or "observation" for a tool's result.
        """
        roles = getattr(tokenizer, "roles", False)
        before = list(history or [])
        inputs = _later_inputs(self, tokenizer, query, before, role)
        settings = _settings(max_length, num_beams, do_sample, top_p, temperature, logits_processor, kwargs)
        if roles:
            settings.setdefault("eos_token_id", _role_stops(tokenizer))
        ids = self.generate(**inputs, **settings)[0].tolist()[inputs["input_ids"].shape[1] :]
        if roles:
            turns = [*before, {"role": role, "content": query}]
            return self.process_response(tokenizer.decode(ids[:-1]), turns)  # type: ignore[no-any-return]
        response = self.process_response(tokenizer.decode(ids))
        return response, [*before, (query, response)]

    @torch.inference_mode()
    def stream_chat(
        self: Any,
        tokenizer: Any,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        past_key_values: Any = None,
        max_length: int = 8192,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: Any = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Like `chat`, after every token; with `return_past_key_values` `(response, history, cache)`.

        Args:
            past_key_values: the cache of the conversation so far: the new round alone is read.
        """
        roles = getattr(tokenizer, "roles", False)
        before = list(history or [])
        if past_key_values is None:
            inputs = _later_inputs(self, tokenizer, query, before, role)
        else:
            inputs = self.build_stream_inputs(tokenizer, query, before, role)
            known = past_key_values.get_seq_length() - self.transformer.prefix_length
            inputs["position_ids"] = inputs["position_ids"] + known
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (known, 0), value=1)
        choose = _chooser(do_sample, top_p, temperature, logits_processor)
        stops = _role_stops(tokenizer) if roles else _stops(self)
        limit = _limit(inputs, max_length, kwargs)
        for ids, past in _steps(self, inputs, choose, limit, stops, past_key_values):
            text = tokenizer.decode([i for i in ids if i not in stops])
            if roles:
                found = self.process_response(text, [*before, {"role": role, "content": query}])
            else:
                response = self.process_response(text)
                found = response, [*before, (query, response)]
            yield (*found, past) if return_past_key_values else found

    def build_stream_inputs(
        self: Any, tokenizer: Any, query: str, history: Sequence[Any] | None = None, role: str = "user"
    ) -> dict[str, Tensor]:
        """What is read after a cached conversation: the new round without control tokens in front."""
        if getattr(tokenizer, "roles", False):
            ids = [*tokenizer.build_single_message(role, "", query), tokenizer.get_command("<|assistant|>")]
        elif history:
            # The space that SentencePiece puts in front is not there in the middle of a text.
            ids = tokenizer.encode(chatglm_text.next_round(query, len(history)), add_special_tokens=False)[1:]
        else:
            ids = tokenizer.encode(tokenizer.build_prompt(query))
        return _to(self, tokenizer.pad({"input_ids": [ids]}, return_tensors="pt"))

    def process_response(self, output: str, history: Sequence[Any] | None = None) -> Any:
        """An answer as it is shown; with a history of turns ChatGLM3's `(content, history)`."""
        return chatglm_text.dated(output) if history is None else chatglm_text.read_answer(output, history)


def _later_inputs(model: Any, tokenizer: Any, query: str, history: Sequence[Any], role: str) -> dict[str, Tensor]:
    if getattr(tokenizer, "roles", False):
        return _to(model, tokenizer.build_chat_input(query, history, role))
    return _to(model, tokenizer([tokenizer.build_prompt(query, history)], return_tensors="pt"))


def _to(model: Any, found: Any) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in found.items()}


# -- generating -----------------------------------------------------------------------------------------------------------


def _settings(
    max_length: int, beams: int, sample: bool, top_p: float, temperature: float, processors: Any, others: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `generate`; a `max_new_tokens` among the others is taken instead of the length."""
    found: dict[str, Any] = {"num_beams": beams, "do_sample": sample, "logits_processor": _processors(processors)}
    if sample:
        found |= {"top_p": top_p, "temperature": temperature}
    if "max_new_tokens" not in others:
        found["max_length"] = max_length
    return {**found, **others}


def _processors(given: Any) -> Any:
    return LogitsProcessorList([*(given or []), InvalidScores()])


def _stops(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [int(found)]


def _role_stops(tokenizer: Any) -> list[int]:
    return [int(tokenizer.eos_token_id), tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>")]


def _limit(inputs: dict[str, Tensor], max_length: int, others: dict[str, Any]) -> int:
    """New tokens, at most."""
    return int(others.get("max_new_tokens") or max(max_length - inputs["input_ids"].shape[1], 1))


def _chooser(sample: bool, top_p: float, temperature: float, processors: Any) -> Any:
    """From ids and logits of the last token to the next id `[B]`."""
    steps = _processors(processors)
    if sample and temperature != 1.0:
        steps.append(TemperatureLogitsWarper(temperature))
    if sample and top_p < 1.0:
        steps.append(TopPLogitsWarper(top_p))

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        scores = steps(ids, logits)
        if not sample:
            return scores.argmax(-1)  # type: ignore[no-any-return]
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1)

    return choose


def _steps(
    model: Any, inputs: dict[str, Tensor], choose: Any, limit: int, stops: Sequence[int], past: Any = None
) -> Iterator[tuple[list[int], Any]]:
    """The new ids after every token, and the cache."""
    ids = inputs["input_ids"]
    state: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    new: list[int] = []
    fresh = ids
    while len(new) < limit:
        step = {name: tensor for name, tensor in state.items() if tensor is not None}
        if "position_ids" in step:
            step["position_ids"] = step["position_ids"][..., -fresh.shape[1] :]
        elif new:
            step |= model.prepare_inputs_for_generation(ids, past_key_values=past)
            step = {name: value for name, value in step.items() if name == "position_ids"}
        mask = step.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            step["attention_mask"] = mask[:, :, -fresh.shape[1] :]
        output = model(**(step | {"input_ids": fresh, "past_key_values": past, "use_cache": True}))
        past = output.past_key_values
        fresh = choose(ids, output.logits[:, -1].float())[:, None]
        ids = torch.cat([ids, fresh], dim=1)
        new.append(int(fresh))
        state = model._update_model_kwargs_for_generation(output, state)
        state.pop("past_key_values", None)
        yield list(new), past
        if new[-1] in stops:
            return
