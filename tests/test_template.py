"""What a ticket and a template become together, and what is said of a template that cannot be used."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import UsageError
from worker.job import ChatRequest
from worker.template import DEFAULT, Template, check, load
from worker.tickets import Ticket, open_tickets

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
REAL_FILE = EXAMPLES.parent.parent / "shared/data/it_tickets_5431.csv"


def written(tmp_path, text):
    path = tmp_path / "template.toml"
    path.write_text(text, "utf-8")
    return path


def refusal(tmp_path, text):
    with pytest.raises(UsageError) as caught:
        load(written(tmp_path, text))
    assert "template.toml" in str(caught.value)
    return str(caught.value)


def test_a_ticket_becomes_a_request_with_every_part_of_the_template(tmp_path):
    template = load(
        written(
            tmp_path,
            """
            system = "Be kind to {{ name }}."
            user = "{{ row['Body Text'] }} <{{ body }}>"
            [parameters]
            temperature = 0
            max_tokens = 50
            [schema]
            type = "object"
            required = ["urgency"]
            additionalProperties = false
            properties.urgency.type = "string"
            """,
        )
    )
    request = template.request(Ticket(1, {"name": "Ann", "Body Text": "A & B", "body": "b"}))
    assert request.messages == [
        {"role": "system", "content": "Be kind to Ann."},
        {"role": "user", "content": "A & B <b>"},
    ]
    assert request.parameters["temperature"] == 0
    assert request.parameters["max_tokens"] == 50
    assert request.parameters["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": template.schema, "strict": True},
    }
    assert template.fields == ["urgency"]


@given(body=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1))
def test_values_are_data_whatever_they_look_like(body):
    template = Template(user="<{{ body }}>")
    for value in (body, "{{ x }}", "{% raw %}", "{name}", "{# c #}", "%s ${HOME}", f"{{{{ {body} }}}}"):
        assert template.request(Ticket(1, {"body": value})).messages == [{"role": "user", "content": f"<{value}>"}]


def test_the_default_template_lists_every_column():
    request = DEFAULT.request(Ticket(1, {"id": "7", "Any Header": "a\nb"}))
    assert request == ChatRequest([{"role": "user", "content": "id: 7\nAny Header: a\nb\n"}])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user = 'a'\nsytem = 'b'", "unknown key sytem, did you mean 'system'?"),
        ("user = 'a'\n[parameters]\ntemprature = 1", "temprature: unknown parameter, did you mean 'temperature'?"),
        ("user = 'a'\n[parameters]\ntemperature = 3", "temperature: expected a number from 0 to 2"),
        ("user = 'a'\n[parameters]\nuser = 2024-01-01", "user: expected a text"),
        ("user = 'a'\n[parameters]\ntop_p = nan", "top_p: expected"),
        ("system = 'a'", "user: missing"),
        ("user = '  '", "user: missing"),
        ("user = 7", "user: expected a text"),
        ("user = 'a'\nparameters = 'b'", "parameters: expected a table"),
        ("user = '''a\n{{ b '''", "user, line 2:"),
        ("user = 'a'\nsystem = '{% if %}'", "system, line 1:"),
        ("user = ", "not TOML"),
        ("user = 'a'\n[schema]\ntype = 'objekt'", "not a JSON Schema at $.type"),
        ("user = 'a'\n[schema]\n'$ref' = 'http://127.0.0.1/s'", "$ref"),
        ("user = 'a'\n[parameters.response_format]\ntype = 'text'\n[schema]\ntype = 'object'", "response_format"),
    ],
)
def test_templates_that_cannot_be_used_say_why(tmp_path, text, said):
    assert said in refusal(tmp_path, text)


def test_a_template_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no template .*absent\.toml"):
        load(tmp_path / "absent.toml")


def test_columns_the_file_has_not_are_named_with_the_nearest(tmp_path):
    template = Template(user="{{ boddy }} {{ row['Titel'] }} {{ id }} {{ ticket_no }} {{ range }}")
    with pytest.raises(UsageError) as caught:
        check(template, ["id", "body", "Title", "Ticket No"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "{{ boddy }}" in lines[0]
    assert "did you mean 'body'?" in lines[0]
    assert "did you mean 'Ticket No'?" in lines[1]
    assert "row['Titel']" in lines[2]
    assert "did you mean 'Title'?" in lines[2]


def test_names_the_template_makes_itself_are_no_columns():
    check(Template(user="{% for k in row %}{{ k }}{% endfor %}{% set x = 1 %}{{ x }}{{ row.get('may lack') }}"), ["id"])


@pytest.mark.parametrize("name", ["namespace", "dict", "lipsum", "self", "loop", "cycler"])
def test_a_column_may_be_called_like_something_of_jinja(name):
    assert Template(user=f"{{{{ row['{name}'] }}}}").request(Ticket(1, {name: "v"})).messages[0]["content"] == "v"


def test_a_column_that_is_missing_is_not_hidden_by_a_name_of_jinja():
    with pytest.raises(UsageError, match="namespace"):
        check(Template(user="{{ namespace }}"), ["id"])


def test_a_row_without_a_value_is_refused_never_asked_with_a_gap():
    with pytest.raises(ValueError, match="body"):
        Template(user="{{ title }} {{ body }}").request(Ticket(1, {"title": "t"}))


@pytest.mark.parametrize("text", ["{{ body + 1 }}", "{{ body.format() }}", "{{ row[body] }}", "{{ body.encode('ascii') }}"])
def test_a_row_the_template_fails_on_is_refused_without_its_text(text):
    with pytest.raises(ValueError, match="the template") as caught:
        Template(user=text).request(Ticket(1, {"body": "{secret} ü"}))
    assert "secret" not in str(caught.value)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        Template(user="{{ body }}").request(Ticket(1, {"body": " \n"}))


@pytest.mark.parametrize("text", ["{{ row.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"])
def test_a_template_reaches_nothing_outside_its_row(text):
    with pytest.raises(ValueError, match=r"needs what|SecurityError"):
        Template(user=text).request(Ticket(1, {"a": "b"}))


def test_what_postgres_cannot_store_is_replaced_in_the_prompt():
    assert Template(user=r"{{ 'a\x00b' }}").request(Ticket(1, {})).messages[0]["content"] == "a\ufffdb"


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        ({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, False),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, False),
        ({"type": "array", "items": {"type": "object", "properties": {}}}, False),
    ],
)
def test_only_a_closed_schema_is_called_strict(schema, strict):
    sent = Template(user="a", schema=schema).request(Ticket(1, {})).parameters["response_format"]
    assert sent["json_schema"]["strict"] is strict


@pytest.mark.parametrize("template", ["triage.toml", "reply.toml"])
@pytest.mark.parametrize("file", [EXAMPLES / "tickets.csv", REAL_FILE], ids=["demo", "real"])
def test_the_examples_fit_the_files_they_are_for(template, file):
    if not file.exists():
        pytest.skip(f"{file.name} is not beside the project")
    loaded = load(EXAMPLES / template)
    with open_tickets(str(file)) as source:
        check(loaded, source.columns)
        for ticket in source:
            request = loaded.request(ticket)
            assert ticket.values["body"] in request.messages[-1]["content"]
            json.dumps(request.to_json(), allow_nan=False)
    assert loaded.fields == (["category", "urgency", "summary"] if template == "triage.toml" else [])
