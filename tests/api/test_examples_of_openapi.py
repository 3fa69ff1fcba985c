"""The OpenAPI description shows an example of everything that goes in and comes out, and each is as its schema says."""

import inspect

import jsonschema_rs
import pytest
from pydantic import BaseModel

from api import chat, file_batches, files, models, schemas, webhooks

MODULES = (chat, file_batches, files, models, schemas, webhooks)
SHOWN = sorted(
    {
        one
        for module in MODULES
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, BaseModel) and one is not BaseModel
    },
    key=lambda model: (model.__module__, model.__name__),
)


def described(stage):
    document = stage.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answers = [answer for status, answer in operation["responses"].items() if status.startswith("2")]
            for body in (operation.get("requestBody", {}), *answers):
                for kind, media in body.get("content", {}).items():
                    schema = media.get("schema", {})
                    named = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
                    yield f"{method} {path} {kind}", media | named


def test_everything_that_goes_in_or_comes_out_has_an_example(stage):
    assert not [name for name, known in described(stage) if "example" not in known]


@pytest.mark.parametrize("model", SHOWN, ids=lambda model: model.__name__)
def test_an_example_is_as_its_schema_says(model):
    schema = model.model_json_schema(mode="serialization")
    if "example" in schema:
        assert not [error.message for error in jsonschema_rs.iter_errors(schema, schema["example"])]
