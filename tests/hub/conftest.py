"""A local Hub with published models, and processes of its users."""

from types import SimpleNamespace

import pytest

from tests.hub.process import Visitors
from tests.hub.server import LocalHub

OWNER_TOKEN, OTHER_TOKEN = "hf_ownersecret", "hf_othersecret"


@pytest.fixture(scope="package")
def hub():
    """The server, with two users: `owner` and `other`."""
    with LocalHub({OWNER_TOKEN: "owner", OTHER_TOKEN: "other"}) as server:
        yield server


@pytest.fixture(scope="package")
def visit(hub, tmp_path_factory):
    """`visit(name, *arguments, package=False, token=None)`: runs a function of `visits.py` in a fresh process."""
    visitors = Visitors(hub.url, tmp_path_factory.mktemp("home"))
    yield visitors
    visitors.close()


@pytest.fixture(scope="package")
def published(hub, visit, tmp_path_factory):
    """Models that `owner` has pushed, and the file with what they compute."""
    case = tmp_path_factory.mktemp("case") / "case.pt"
    value, printed = visit("publish", str(case), package=True, token=OWNER_TOKEN)
    return SimpleNamespace(case=str(case), urls=value, printed=printed)
