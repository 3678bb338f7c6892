"""Published models, loaded from a Hub in every way a user may choose: equal logits, equal tokens."""

import json
from pathlib import Path

import pytest

from tests.hub.conftest import OTHER_TOKEN, OWNER_TOKEN

pytestmark = pytest.mark.slow
EQUAL = {"difference": 0.0, "tokens": True}


@pytest.fixture
def asked(hub):
    """What the server is asked during a test."""
    start = len(hub.requests)
    return lambda: hub.requests[start:]


@pytest.mark.parametrize("kind", ["model", "causal"])
@pytest.mark.parametrize("repo", ["owner/pdt", "owner/whole"])
def test_auto_classes_without_the_package(visit, published, kind, repo):
    value, _ = visit("load", kind, repo, published.case)
    assert value.pop("kind").startswith("transformers_modules.")
    assert value == EQUAL


@pytest.mark.parametrize("repo", ["owner/pdt", "owner/whole"])
def test_the_package_runs_no_remote_code(visit, published, repo, asked):
    value, _ = visit("composite", repo, published.case, package=True)
    assert value == {**EQUAL, "kind": "modeling_pdt.modeling_pdt"}
    assert not [path for _, path, _ in asked() if path.endswith(".py")]


def test_peft_view(visit, published):
    value, _ = visit("peft_view", "owner/pdt", published.case, package=True)
    assert value["difference"] == 0.0


def test_configuration_alone(visit, published):
    value, _ = visit("read_config", "owner/pdt")
    assert value.pop("module").startswith("transformers_modules.")
    assert value == {"trunk": "owner/trunk", "block_size": 4}


@pytest.mark.parametrize("package_first", [True, False])
def test_package_and_remote_copy_in_one_process(visit, published, package_first):
    value, _ = visit("copies_together", "owner/pdt", published.case, package_first, package=True)
    assert value["package"].pop("kind") == "modeling_pdt.modeling_pdt"
    # Once the package has registered its classes, the auto classes take them.
    remote = "modeling_pdt." if package_first else "transformers_modules."
    assert value["remote"].pop("kind").startswith(remote)
    assert value == {"package": EQUAL, "remote": EQUAL}


def test_revision(visit, published):
    untrained = published.urls["untrained"].rsplit("/", 1)[1]
    for revision, equal in ((untrained, False), ("main", True)):
        for name, package in (("load", False), ("composite", True)):
            words = ("model",) if name == "load" else ()
            value, _ = visit(name, *words, "owner/pdt", published.case, package=package, revision=revision)
            assert (value["difference"] == 0.0, value["tokens"]) == (equal, equal), (revision, name)


@pytest.mark.parametrize("package", [False, True])
def test_a_private_repository_needs_its_owner(visit, published, package):
    words = ("composite", "owner/secret") if package else ("load", "model", "owner/secret")
    for token in (None, OTHER_TOKEN):
        value, _ = visit("error_of", *words, published.case, package=package, token=token)
        assert "owner/secret" in value["text"]
    value, _ = visit(*words, published.case, package=package, hub_token=OWNER_TOKEN)
    assert (value["difference"], value["tokens"]) == (0.0, True)
    value, _ = visit(*words, published.case, package=package, token=OWNER_TOKEN)
    assert (value["difference"], value["tokens"]) == (0.0, True)


@pytest.mark.parametrize("package", [False, True])
def test_cache_folder_and_offline(visit, published, tmp_path, asked, package):
    words = ("composite", "owner/pdt") if package else ("load", "causal", "owner/pdt")
    options = {"package": package, "cache_dir": str(tmp_path)}
    # transformers looks for an adapter at the root by itself, whatever it is told.
    own = [] if package else [("HEAD", "/owner/pdt/resolve/main/adapter_config.json", None)]
    visit("error_of", *words, published.case, **options, local_files_only=True)
    assert [request for request in asked() if request not in own] == []
    visit(*words, published.case, **options)
    assert {"models--owner--pdt", "models--owner--trunk"} <= {path.name for path in tmp_path.iterdir()}
    seen = len(asked())
    value, _ = visit(*words, published.case, **options, local_files_only=True)
    assert (value["difference"], value["tokens"]) == (0.0, True)
    assert [request for request in asked()[seen:] if request not in own] == []


def test_arguments_reach_the_trunk(visit, published, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    options = {"device_map": places, "offload_folder": str(tmp_path)}
    value, _ = visit("choices", "owner/pdt", dtype="bfloat16", attn_implementation="eager", **options)
    assert value == {
        "dtype": ["torch.bfloat16"],
        "adapter_dtype": ["torch.float32"],
        "attention": "eager",
        "offloaded": ["0", "2"],
    }


def test_forks_and_renamed_repositories(visit, published, hub):
    hub.fork("owner/whole", "other/copy")
    hub.fork("owner/whole", "owner/before")
    hub.rename("owner/before", "owner/after")
    for repo in ("other/copy", "owner/before", "owner/after"):
        value, _ = visit("load", "model", repo, published.case)
        assert (value["difference"], value["tokens"]) == (0.0, True), repo
        value, _ = visit("composite", repo, published.case, package=True)
        assert (value["difference"], value["tokens"]) == (0.0, True), repo


def test_a_saved_copy_of_a_published_model(visit, published, tmp_path):
    value, _ = visit("save_again", "owner/whole", published.case, str(tmp_path / "copy"))
    assert (value["difference"], value["tokens"]) == (0.0, True)
    assert (tmp_path / "copy" / "modeling_pdt.py").read_bytes() == Path("modeling_pdt/modeling_pdt.py").read_bytes()


def test_text_generation_pipeline(visit, published):
    value, _ = visit("write_text", "owner/pdt")
    assert len(value) == 3
    assert all(text.startswith("Describe the town of Velmar in three parts.") for text in value)
    assert len(set(value)) > 1


def test_a_load_reads_one_commit_of_adapters_and_trunk(visit, published, hub, asked, tmp_path):
    config = json.loads(hub.files("owner/pdt")["config.json"])
    trunk = hub.repositories["model", "owner/trunk"]
    assert config["trunk_revision"] == trunk.resolve("main")
    visit("composite", "owner/pdt", published.case, package=True, cache_dir=str(tmp_path))
    paths = {path for _, path, _ in asked() if "/resolve/" in path}
    assert {path.split("/")[4] for path in paths if path.startswith("/owner/trunk/")} == {config["trunk_revision"]}
    assert len([path for _, path, _ in asked() if path.startswith("/api/models/owner/pdt")]) == 1


def test_nothing_of_the_machine_is_published(published, hub, tmp_path):
    for repo in ("owner/pdt", "owner/whole"):
        files = hub.files(repo)
        words = [b"/tmp", str(tmp_path.parents[1]).encode(), b"hf_ownersecret", str(Path.home()).encode() + b"/"]
        found = [(path, word) for path, content in files.items() for word in words if word in content]
        assert not found
        assert "adapter/README.md" not in files
        assert not [path for path in files if path.endswith((".bin", ".pt", ".pkl"))]
