"""Tokens that a vendor did not count: reckoned from what was asked and answered, and marked as an estimate."""

from __future__ import annotations

from dataclasses import replace

from worker.cost import estimated_tokens
from worker.job import ChatRequest
from worker.providers.provider import Reply


def counted(reply: Reply, request: ChatRequest) -> Reply:
    """The reply, in which an answer has its input and output tokens; all else is as it was.

    A count of 0 is none: nobody is asked nothing, and nobody answers nothing.
    """
    answer = reply.answer
    if answer is None or (answer.usage.input_tokens and answer.usage.output_tokens):
        return reply
    said = estimated_tokens(answer.content or "") + (estimated_tokens(answer.tool_calls) if answer.tool_calls else 0)
    usage = replace(
        answer.usage,
        input_tokens=answer.usage.input_tokens or estimated_tokens(request.messages),
        output_tokens=answer.usage.output_tokens or said,
        estimated=True,
    )
    return replace(reply, answer=replace(answer, usage=usage), usage=usage)
