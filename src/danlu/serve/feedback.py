"""`POST /api/vote`: what people think of an answer, stored with the exact prompt that the model saw."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter, Request

from danlu.assistant import Assistant
from danlu.data.feedback import FeedbackDatabase, Vote
from danlu.serve.protocol import ApiError, VoteRequest

router = APIRouter(prefix="/api")


@router.post("/vote")
async def vote(body: VoteRequest, request: Request) -> dict[str, str]:
    """Stores a vote, replaces an earlier one on the same answer, or (`none`) takes it back."""
    if body.messages[-1].role == "assistant":
        raise ApiError(400, "Send the messages before the answer: the last one is an answer.", param="messages")
    state = request.app.state
    await to_thread.run_sync(_store, state.assistant, state.feedback, state.model_name, body)
    return {"vote": body.vote}


def _store(assistant: Assistant, database: FeedbackDatabase, model: str, body: VoteRequest) -> None:
    assert assistant.template is not None, "create_app looked"
    messages = [message.plain() for message in body.messages]
    prompt = assistant.template.render(messages, add_generation_prompt=True)
    if body.vote == "none":
        database.withdraw(model, prompt, body.answer)
    else:
        database.store(Vote(prompt, messages, body.answer, body.vote, model, dict(body.params)))
