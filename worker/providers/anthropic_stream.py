"""Puts the events of a streamed message together."""

from __future__ import annotations

import json
from typing import Any

from worker.providers.stream import Heard

_PIECES = {"text_delta": "text", "input_json_delta": "partial_json", "thinking_delta": "thinking"}


class MessageAssembly:
    """Blocks by index, pieces in the order they came; usage as it was stated last, for its counts are cumulative."""

    def __init__(self) -> None:
        self.finished = False
        self._message: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._pieces: dict[int, list[str]] = {}

    def take(self, event: dict[str, Any]) -> Heard:
        match event.get("type"):
            case "message_start":
                message = event.get("message")
                self._message = message if isinstance(message, dict) else {}
                self._count(self._message)
            case "content_block_start":
                return self._open(event.get("index"), event.get("content_block"))
            case "content_block_delta":
                return self._add(event.get("index"), event.get("delta"))
            case "message_delta":
                delta = event.get("delta")
                if isinstance(delta, dict) and delta.get("stop_reason"):
                    self._message["stop_reason"], self.finished = delta["stop_reason"], True
                self._count(event)
            case "message_stop":
                return Heard.END
            case "ping":
                return Heard.NOTHING
            case _:
                return Heard.FAULT if event.get("error") else Heard.PROGRESS
        return Heard.PROGRESS

    def whole(self) -> dict[str, Any]:
        blocks = [self._block(index) for index in sorted(self._blocks)]
        return {**self._message, "type": "message", "content": blocks, "usage": self._usage}

    def _count(self, event: dict[str, Any]) -> None:
        usage = event.get("usage")
        if isinstance(usage, dict):
            self._usage |= {name: count for name, count in usage.items() if count is not None}

    def _open(self, index: Any, block: Any) -> Heard:
        if isinstance(index, int) and isinstance(block, dict):
            self._blocks[index], self._pieces[index] = block, []
            return Heard.TOKEN if block.get("type") == "tool_use" or block.get("text") else Heard.PROGRESS
        return Heard.PROGRESS

    def _add(self, index: Any, delta: Any) -> Heard:
        piece = delta.get(_PIECES.get(str(delta.get("type")), "")) if isinstance(delta, dict) else None
        if not isinstance(index, int) or index not in self._blocks or not isinstance(piece, str):
            return Heard.PROGRESS
        self._pieces[index].append(piece)
        return Heard.TOKEN if piece else Heard.PROGRESS

    def _block(self, index: int) -> dict[str, Any]:
        block, said = self._blocks[index], "".join(self._pieces[index])
        if block.get("type") == "text":
            begun = block.get("text")
            return {**block, "text": (begun if isinstance(begun, str) else "") + said}
        if block.get("type") == "tool_use" and said:
            try:
                return {**block, "input": json.loads(said)}
            except (ValueError, RecursionError):
                return {**block, "input": said}
        return block
