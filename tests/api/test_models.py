"""The names that `model` may be, as OpenAI lists models."""

from api.models import ModelOut
from worker.config import parse


def named(stage, path=""):
    return stage.client.get(f"/v1/models{path}")


def test_chains_providers_and_their_models_are_listed_once_each(stage):
    body = named(stage).json()
    assert body["object"] == "list"
    assert [(model["id"], model["owned_by"], model["object"]) for model in body["data"]] == [
        ("default", "backstop", "model"),
        ("a", "backstop", "model"),
        ("m-a", "a", "model"),
    ]
    assert all(isinstance(model["created"], int) for model in body["data"])


def test_a_name_that_several_share_is_listed_as_what_a_request_gets():
    from api.models import _models

    config = parse(
        {
            "providers": {
                "a": {"base_url": "http://127.0.0.1:1", "model": "default"},
                "b": {"base_url": "http://127.0.0.1:1", "model": "shared"},
                "c": {"base_url": "http://127.0.0.1:1", "model": "shared"},
            },
            "chains": {"default": {"providers": ["a"]}, "b": {"providers": ["a"]}},
        },
        "test",
    )
    assert list(_models(config).values()) == [
        ModelOut(id="default", owned_by="backstop"),
        ModelOut(id="b", owned_by="backstop"),
        ModelOut(id="a", owned_by="backstop"),
        ModelOut(id="c", owned_by="backstop"),
        ModelOut(id="shared", owned_by="b"),
    ]


def test_a_model_is_retrieved_by_its_name_which_may_hold_slashes(stage):
    assert named(stage, "/m-a").json() == {"id": "m-a", "object": "model", "created": 0, "owned_by": "a"}
    response = named(stage, "/vendor/m%20x")
    assert response.status_code == 404
    assert response.json()["error"]["message"].startswith("the model 'vendor/m x' does not exist")
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("model_not_found", "model")


def test_no_address_and_no_key_is_told(stage):
    assert "127.0.0.1" not in named(stage).text
    assert "127.0.0.1" not in named(stage, "/a").text
