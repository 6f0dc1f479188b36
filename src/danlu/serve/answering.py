"""The running answers to one request: submitted together, read in worker threads, cancelled when the client leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from danlu.assistant import Assistant
from danlu.generation.protocol import Completion, SamplingParams
from danlu.serve.protocol import ApiError
from danlu.types import Message


class Answering:
    """One prompt and an engine request for each choice. Every method may wait for the engine: call them in threads.

    Args:
        assistant: what answers.
        messages: the conversation.
        params: one set for each choice.

    Raises:
        ApiError: the conversation leaves no room in the model's context.
        TemplateError: the chat template refuses the messages.
    """

    def __init__(self, assistant: Assistant, messages: Sequence[Message], params: Sequence[SamplingParams]) -> None:
        self._assistant = assistant
        first = assistant.request(messages, params[0])
        self.prompt_tokens = len(first.prompt_ids)
        self.stop = params[0].stop
        self.stop_ids = first.params.stop_ids
        if self.prompt_tokens >= assistant.context:
            raise ApiError(
                400,
                f"This model's context holds {assistant.context} tokens and the messages have {self.prompt_tokens}. "
                "Shorten the messages.",
                param="messages",
                code="context_length_exceeded",
            )
        engine = assistant.engine
        requests = [replace(first, params=replace(p, stop_ids=self.stop_ids)) for p in params]
        self._open = [engine.submit(request) for request in requests]

    def pieces(self) -> Iterator[str]:
        """Text of the first choice as it is sampled."""
        # Kept, so that leaving it behind in the event loop cannot close it there: closing waits for the engine.
        self._pieces = self._assistant.stream_request(self._open[0], self.stop)
        return self._pieces

    def results(self) -> list[Completion]:
        """Waits for all choices, in order; after that the engine has forgotten them."""
        done = []
        while self._open:
            done.append(self._assistant.engine.result(self._open[0]))
            del self._open[0]
        return done

    def cancel(self) -> None:
        """Frees the engine's slots at once; whoever waits gets what there is."""
        for request_id in list(self._open):
            self._assistant.engine.cancel(request_id)

    def close(self) -> None:
        """Cancels what still runs and makes the engine forget it. No other thread may be waiting any more."""
        self.cancel()
        self.results()
