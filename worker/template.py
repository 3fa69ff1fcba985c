"""A prompt template: TOML with Jinja2 in `system` and `user`, from which each ticket becomes a chat request."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from worker import batchlines, tomlfile
from worker.errors import UsageError
from worker.job import ChatRequest
from worker.textfile import UNSTORABLE
from worker.tickets import Ticket

# What is made is a prompt, not HTML. A missing value is an error, never an empty place in 100,000 prompts.
_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)
_JINJA.globals = {"range": _JINJA.globals["range"]}  # so that no name of Jinja's hides a column that is missing


@dataclass(frozen=True)
class Template:
    """What to ask of each ticket. `parameters` go to the provider; `schema` is the JSON Schema its answer must fit.

    In `user` and `system` a column stands by its name where that is an identifier, any by `row['Its Name']`.
    """

    user: str
    system: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] | None = None

    @property
    def fields(self) -> list[str]:
        """Properties of the schema, in its order: columns of the exported CSV."""
        return list((self.schema or {}).get("properties", {}))

    def request(self, ticket: Ticket) -> ChatRequest:
        """What is asked about this ticket. Values are data: what looks like a template in them stays as it is.

        Raises ValueError, without any of the ticket's text, when a value is missing or the prompt comes out empty.
        """
        messages = [{"role": "system", "content": _render(self.system, ticket)}] if self.system else []
        user = _render(self.user, ticket)
        if not user.strip():
            raise ValueError("the template gives an empty prompt for this row")
        return ChatRequest([*messages, {"role": "user", "content": user}], self.parameters | self._response_format())

    def _response_format(self) -> dict[str, Any]:
        if self.schema is None:
            return {}
        named = {"name": "answer", "schema": self.schema, "strict": _is_strict(self.schema)}
        return {"response_format": {"type": "json_schema", "json_schema": named}}


DEFAULT = Template(user="{% for name, value in row.items() %}\n{{ name }}: {{ value }}\n{% endfor %}")


def load(path: Path) -> Template:
    """The checked template. Raises UsageError naming the file, the key or line, and what was expected."""
    try:
        return _template(tomlfile.read(path, absent=f"no template {path}: check the name given with --prompt"))
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def _template(body: Mapping[str, Any]) -> Template:
    kinds = {"user": str, "system": str, "parameters": dict, "schema": dict}
    for name, value in body.items():
        if name not in kinds:
            raise ValueError(f"unknown key {name}{_hint(name, kinds)}")
        if not isinstance(value, kinds[name]):
            raise ValueError(f"{name}: expected {'a table' if kinds[name] is dict else 'a text'}")
    if not body.get("user", "").strip():
        raise ValueError("user: missing; it is the prompt, as in user = 'Answer this ticket: {{ body }}'")
    if "schema" in body and "response_format" in body.get("parameters", {}):
        raise ValueError("parameters.response_format: leave it out, [schema] sets it")
    for name in ("system", "user"):
        _check_text(name, body.get(name, ""))
    asked = batchlines.parameters(Template(**body)._response_format())
    schema = asked["response_format"]["json_schema"]["schema"] if asked else None
    return Template(body["user"], body.get("system"), batchlines.parameters(body.get("parameters", {})), schema)


def _check_text(name: str, text: str) -> None:
    try:
        _compiled(text)
        _wanted(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{name}, line {error.lineno}: {error.message}") from None
    except (RecursionError, MemoryError, SyntaxError):  # how Python says so of what Jinja makes of it
        raise ValueError(f"{name}: nested too deeply") from None


def check(template: Template, columns: Iterable[str]) -> None:
    """The template asks for nothing the file has not. Raises UsageError naming each column that is missing.

    What a row may lack is asked for with `row.get('Name')`, which is not checked.
    """
    known = list(columns)
    lines = []
    for name, written in {**_wanted(template.system or ""), **_wanted(template.user)}.items():
        if name not in known:
            hint = _hint(name, known) or f"; there are: {', '.join(known)}"
            lines.append(f"the template uses {written}, but the file has no column {name!r}{hint}")
    if lines:
        raise UsageError("\n".join(lines))


@lru_cache(maxsize=16)
def _wanted(text: str) -> dict[str, str]:
    """Each column the text names, and how it names it."""
    tree = _JINJA.parse(text)
    names = meta.find_undeclared_variables(tree) - {"row"} - _JINJA.globals.keys()
    wanted = {name: f"{{{{ {name} }}}}" for name in sorted(names)}
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.node, nodes.Name) and item.node.name == "row" and isinstance(item.arg, nodes.Const):
            wanted[str(item.arg.value)] = f"row[{item.arg.value!r}]"
    return wanted


@lru_cache(maxsize=16)
def _compiled(text: str) -> jinja2.Template:
    return _JINJA.from_string(text)


def _render(text: str, ticket: Ticket) -> str:
    # What Jinja says of an error is left out: it may hold the ticket's text.
    try:
        rendered = _compiled(text).render({**ticket.values, "row": ticket.values})
    except jinja2.UndefinedError:
        missing = ", ".join(name for name in _wanted(text) if name not in ticket.values)
        raise ValueError(f"the template needs what this row has not: {missing or 'a value'}") from None
    except Exception as error:
        raise ValueError(f"the template fails on this row: {type(error).__name__}") from None
    return UNSTORABLE.sub("\ufffd", rendered)


def _is_strict(schema: Any) -> bool:
    """Whether OpenAI takes the schema as `strict`: every object closed, every property required; else it refuses it."""
    if isinstance(schema, list):
        return all(map(_is_strict, schema))
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" or isinstance(schema.get("properties"), dict):
        if schema.get("additionalProperties") is not False:
            return False
        if set(schema.get("required", [])) != set(schema.get("properties", {})):
            return False
    return all(map(_is_strict, schema.values()))


def _hint(word: str, known: Iterable[str]) -> str:
    by_sound = {name.lower().replace(" ", "_"): name for name in known}
    near = difflib.get_close_matches(word.lower().replace(" ", "_"), by_sound, n=1, cutoff=0.5)
    return f", did you mean {by_sound[near[0]]!r}?" if near else ""
