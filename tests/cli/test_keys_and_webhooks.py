"""Commands for who may call, and who is told."""

from uuid import uuid4


def test_a_key_has_the_scopes_and_the_limit_that_were_asked_for(backstop):
    narrow = backstop("keys", "create", "reader", "--scope", "read", "--scope", "submit", "--rpm", "60", "--json").json()["key"]
    assert (narrow["scopes"], narrow["rpm"]) == (["submit", "read"], 60)
    wide = backstop("keys", "create", "person", "--json").json()["key"]
    assert (wide["scopes"], wide["rpm"]) == (["submit", "read", "operate"], None)
    lines = backstop("keys", "list").out.splitlines()
    assert lines[0].split("\t")[4:6] == ["scopes", "rpm"]
    assert ["submit,read", "60"] in [line.split("\t")[4:6] for line in lines]
    for wrong in (["--scope", "fly"], ["--rpm", "0"], ["--rpm", "many"]):
        assert backstop("keys", "create", "wrong", *wrong).code == 2
    assert len(backstop("keys", "list", "--json").json()) == 2


def test_a_webhook_is_made_listed_without_its_secret_looked_at_and_deleted(backstop):
    made = backstop("webhooks", "create", "https://example.com/told", "--tenant", "acme", "--event", "batch.finished", "--json").json()
    assert made["secret"].startswith("whsec_")
    assert (made["webhook"]["tenant"], made["webhook"]["events"]) == ("acme", ["batch.finished"])
    plain = backstop("webhooks", "create", "https://example.com/all")
    assert len(plain.out.splitlines()) == 1
    for ended in (backstop("webhooks", "list", "--json"), backstop("webhooks", "list")):
        assert made["secret"] not in ended.out
        assert plain.out.strip() not in ended.out
    assert backstop("webhooks", "list", "--json").json()[1] == made["webhook"]
    own = made["webhook"]["id"]
    assert backstop("webhooks", "deliveries", own, "--json").json() == []
    assert len(backstop("webhooks", "deliveries", own).out.splitlines()) == 1
    assert backstop("webhooks", "delete", own).code == 0
    for which in (own, str(uuid4()), "x"):
        for action in ("delete", "deliveries"):
            assert backstop("webhooks", action, which).code == 5


def test_a_webhook_to_where_nothing_may_be_sent_is_refused_unless_the_setting_allows_it(backstop, monkeypatch):
    refused = backstop("webhooks", "create", "http://127.0.0.1:8000/")
    assert (refused.code, refused.out) == (2, "")
    assert "BACKSTOP_WEBHOOKS_PRIVATE=true" in refused.err
    monkeypatch.setenv("BACKSTOP_WEBHOOKS_PRIVATE", "true")
    assert backstop("webhooks", "create", "http://127.0.0.1:8000/").code == 0
