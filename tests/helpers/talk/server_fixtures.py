"""Fixtures of the tests of the server, a plugin of theirs: its application in this process."""

import pytest
from scripted_model import scripted_folder
from server_requests import CONTEXT, SCRIPT


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """A model that says SCRIPT to a chat, and goes on for ever after a "a"."""
    from dbrx_quant.runtime.talk.server import Limits, build_app  # needs fastapi

    folder = scripted_folder(tmp_path_factory.mktemp("server") / "m", SCRIPT, context=CONTEXT)
    made = build_app(folder, "m", "cpu", limits=Limits(queue=3, seconds=60))
    yield made
    made.app.state.service.close()


@pytest.fixture
def service(app):
    """The model, and what answers requests to it."""
    return app.app.state.service


@pytest.fixture
def endless(service, monkeypatch):
    """The same model without an end: it says its first token for ever."""
    monkeypatch.setattr(service.model.generation_config, "eos_token_id", None)
    steps = []
    handle = service.model.register_forward_pre_hook(lambda *_: steps.append(1))
    yield steps
    handle.remove()
