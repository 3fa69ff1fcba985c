"""Puts the chunks of a streamed chat completion together."""

from __future__ import annotations

from typing import Any

from worker.providers.stream import Heard


class CompletionAssembly:
    """Of the first choice: its text, its refusal, its tool calls by index; of all chunks: the last usage that was named."""

    def __init__(self) -> None:
        self.finished = False
        self._said: dict[str, list[str]] = {"content": [], "refusal": []}
        self._calls: dict[Any, dict[str, Any]] = {}
        self._finish_reason: str | None = None
        self._about: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> Heard:
        if event.get("error"):
            return Heard.FAULT
        for name in ("model", "usage"):
            if event.get(name):
                self._about[name] = event[name]
        choices = event.get("choices")
        heard = [self._take_choice(choice) for choice in choices] if isinstance(choices, list) else []
        return next((kind for kind in (Heard.FAULT, Heard.TOKEN) if kind in heard), Heard.PROGRESS)

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {name: "".join(texts) if texts else None for name, texts in self._said.items()}
        if self._calls:
            message["tool_calls"] = [_call(pieces) for pieces in self._calls.values()]
        return {**self._about, "choices": [{"index": 0, "message": message, "finish_reason": self._finish_reason}]}

    def _take_choice(self, choice: Any) -> Heard:
        if not isinstance(choice, dict) or choice.get("index") not in (None, 0):
            return Heard.PROGRESS
        if choice.get("error"):
            return Heard.FAULT
        if isinstance(choice.get("finish_reason"), str) and choice["finish_reason"]:
            self._finish_reason, self.finished = choice["finish_reason"], True
        delta = choice.get("delta") or choice.get("message")
        return Heard.TOKEN if isinstance(delta, dict) and self._take_delta(delta) else Heard.PROGRESS

    def _take_delta(self, delta: dict[str, Any]) -> bool:
        """True when it carried a token, if only of thinking, which is not kept."""
        begun = any(delta.get(name) for name in ("reasoning_content", "reasoning"))
        for name, texts in self._said.items():
            text = _text(delta.get(name))
            if text is not None:
                texts.append(text)
                begun = begun or bool(text)
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            if isinstance(call, dict):
                self._take_call(call)
                begun = True
        return begun

    def _take_call(self, call: dict[str, Any]) -> None:
        """A piece of the call of that index; without one (Gemini), an id begins the next call."""
        index = call.get("index")
        if not isinstance(index, int):
            index = len(self._calls) if call.get("id") or not self._calls else next(reversed(self._calls))
        kept = self._calls.setdefault(index, {"arguments": []})
        stated = call.get("function")
        function = stated if isinstance(stated, dict) else {}
        kept["arguments"].append(_text(function.get("arguments")) or "")
        kept.update({name: call[name] for name in call if name not in ("index", "function", "name", "arguments") and call[name]})
        if function.get("name"):
            kept["name"] = function["name"]


def _call(pieces: dict[str, Any]) -> dict[str, Any]:
    function = {"name": pieces.get("name"), "arguments": "".join(pieces["arguments"])}
    return {"type": "function", **{k: v for k, v in pieces.items() if k not in ("name", "arguments")}, "function": function}


def _text(value: Any) -> str | None:
    """Text, or the text parts of a list of parts."""
    if isinstance(value, list):
        return "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return value if isinstance(value, str) else None
