"""What Hub users do, each function in a process of its own; values are JSON. Run through `process.Visitors`."""

import re
from pathlib import Path

import torch
from huggingface_hub import ModelCard, snapshot_download
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

TINY_TOKENIZER = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "trunk"
GREEDY = {"num_streams": 3, "max_new_tokens": 7, "do_sample": False}


def publish(case: str) -> dict:
    """A trunk with its tokenizer; adapters on it; adapters and trunk in one repository; the same in private."""
    from modeling_pdt import PDTForParallelDecoding

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).push_to_hub("owner/trunk")
    tokenizer.push_to_hub("owner/trunk")
    model = PDTForParallelDecoding.from_trunk("owner/trunk", notes_dim=16, block_size=4, adapter_bottleneck=8).eval()
    urls = {"untrained": model.push_to_hub("owner/pdt")}
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    urls["adapters"] = model.push_to_hub("owner/pdt", commit_message="Train")
    urls["whole"] = model.push_to_hub("owner/whole", include_trunk=True)
    urls["private"] = model.push_to_hub("owner/secret", include_trunk=True, private=True)
    for name in ("owner/pdt", "owner/whole"):
        tokenizer.push_to_hub(name)
    inputs = {
        "input_ids": torch.randint(2, config.vocab_size, (3, 14)),
        "stream_ids": torch.arange(3),
        "notes": torch.randn(3, 5, 16),
        "notes_mask": torch.rand(3, 5) < 0.7,
    }
    prompt = tokenizer(["Describe the town of Velmar in three parts.\n"], return_tensors="pt")
    with torch.no_grad():
        outcome = {"logits": model(**inputs).logits, "tokens": model.generate(**prompt, **GREEDY)}
    torch.save({"inputs": inputs, "prompt": dict(prompt), **outcome}, case)
    return urls


@torch.no_grad()
def compare(model, case: str) -> dict:
    """How far a loaded model is from the published one."""
    case = torch.load(case, weights_only=True)
    logits = model(**case["inputs"]).logits
    report = {"difference": (logits - case["logits"]).abs().max().item(), "kind": type(model).__module__}
    if not isinstance(model, PeftModel):
        report["tokens"] = torch.equal(model.generate(**case["prompt"], **GREEDY), case["tokens"])
    return report


def load(kind: str, repo: str, case: str, hub_token: str | None = None, **options) -> dict:
    """Loads in one of the ways that a user may choose, and compares."""
    if hub_token is not None:
        options["token"] = hub_token
    model = {"model": AutoModel, "causal": AutoModelForCausalLM}[kind].from_pretrained(
        repo, trust_remote_code=True, **options
    )
    return compare(model, case)


def composite(repo: str, case: str, hub_token: str | None = None, **options) -> dict:
    """The installed package's own class; no remote code runs."""
    from modeling_pdt import PDTForParallelDecoding

    if hub_token is not None:
        options["token"] = hub_token
    return compare(PDTForParallelDecoding.from_pretrained(repo, **options), case)


def peft_view(repo: str, case: str) -> dict:
    """The adapter on a trunk that the user has loaded, as any PEFT method."""
    import modeling_pdt  # noqa: F401

    trunk = AutoModelForCausalLM.from_pretrained("owner/trunk")
    return compare(PeftModel.from_pretrained(trunk, repo, subfolder="adapter").eval(), case)


def read_config(repo: str) -> dict:
    """The configuration alone."""
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    return {"module": type(config).__module__, "trunk": config.trunk_name_or_path, "block_size": config.block_size}


def choices(repo: str, **options) -> dict:
    """What arguments for the trunk's loader have done."""
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, **options)
    trunk = {name: p for name, p in model.named_parameters() if "pdt_" not in name}
    return {
        "dtype": sorted({str(p.dtype) for p in trunk.values()}),
        "adapter_dtype": sorted({str(p.dtype) for p in model.pdt_parameters().values()}),
        "attention": model.trunk.config._attn_implementation,
        "offloaded": sorted({name.split(".layers.")[1][0] for name, p in trunk.items() if p.is_meta}),
    }


def copies_together(repo: str, case: str, package_first: bool) -> dict:
    """The package and the remote copy of the same code in one process, in either order."""
    reports = {}
    for kind in ("package", "remote") if package_first else ("remote", "package"):
        reports[kind] = composite(repo, case) if kind == "package" else load("model", repo, case)
    return reports


def write_text(repo: str, **options) -> list[str]:
    """The pipeline of transformers."""
    writer = pipeline("text-generation", model=repo, trust_remote_code=True)
    prompt = "Describe the town of Velmar in three parts.\n"
    return [entry["generated_text"] for entry in writer(prompt, **GREEDY, **options)]


def save_again(repo: str, case: str, folder: str) -> dict:
    """Remote code saves itself, completely."""
    AutoModel.from_pretrained(repo, trust_remote_code=True).save_pretrained(folder, include_trunk=True)
    return load("model", folder, case)


def error_of(name: str, *arguments, **options) -> dict:
    """The error that another visit ends with."""
    try:
        value = globals()[name](*arguments, **options)
    except Exception as error:
        return {"type": type(error).__name__, "text": str(error)}
    raise AssertionError(f"{name} raised nothing but returned {value!r}")


def save_with_token(repo: str, folder: str, token: str, debug: bool) -> dict:
    """A private repository with an explicit token, everything logged, saved and described."""
    import logging

    from modeling_pdt import PDTForParallelDecoding

    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(message)s")
    model = PDTForParallelDecoding.from_pretrained(repo, token=token)
    model.load_adapter(repo, "second", token=token)
    model.save_pretrained(folder, include_trunk=True)
    logging.debug("%r %r %r", model.config, model.generation_config, model.peft.peft_config)
    return {"loaded": True}


def generate_on_a_trunk(repo: str, case: str, **options) -> dict:
    """A user who has the trunk alone; what the call leaves behind on it."""
    case = torch.load(case, weights_only=True)
    trunk = AutoModelForCausalLM.from_pretrained("owner/trunk").train()
    trunk.lm_head.eval()
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    before = [(name, type(module), module.training) for name, module in trunk.named_modules()]
    plain = {"max_new_tokens": 7, "do_sample": False}
    expected = trunk.generate(**case["prompt"], **plain)
    report = {"kind": [], "tokens": []}
    for _ in range(2):
        out = trunk.generate(
            **case["prompt"],
            **GREEDY,
            custom_generate=repo,
            trust_remote_code=True,
            return_dict_in_generate=True,
            **options,
        )
        report["kind"].append(type(out).__module__.split(".")[0])
        report["tokens"].append(torch.equal(out.sequences, case["tokens"]))
        report["same_tensors"] = all(torch.equal(tensor, state[name]) for name, tensor in trunk.state_dict().items())
        report["same_names"] = list(trunk.state_dict()) == list(state)
        report["same_modules"] = [(n, type(m), m.training) for n, m in trunk.named_modules()] == before
        report["learns"] = all(parameter.requires_grad for parameter in trunk.parameters())
        report["same_plain"] = torch.equal(trunk.generate(**case["prompt"], **plain), expected)
        report["peft"] = hasattr(trunk, "peft_config")
        report.setdefault("lent", []).append(id(vars(trunk)["_pdt_lent"][1]))
    return report


def generate_on_another_trunk(repo: str, case: str, **options) -> None:
    """Adapters on a trunk of another shape, or with an argument that there is not."""
    case = torch.load(case, weights_only=True)
    config = AutoConfig.from_pretrained("owner/trunk", num_hidden_layers=options.pop("layers", 3))
    LlamaForCausalLM(config).generate(
        **case["prompt"], **GREEDY, custom_generate=repo, trust_remote_code=True, **options
    )


def release(folder: str, repo: str, *words: str) -> str | None:
    """The recipe that publishes."""
    from recipes import push_to_hub

    return push_to_hub.main(["--model", folder, "--repo_id", repo, *words])


def space(*words: str) -> str | None:
    """The recipe that publishes a Space."""
    from recipes import push_space

    return push_space.main([*words])


def decode_release(repo: str) -> dict:
    """A stranger runs the card's code, on the model and then on its trunk alone."""
    first, second = re.findall(r"```python\n(.*?)```", ModelCard.load(repo).text, re.DOTALL)
    values = {}
    exec(first, values)
    model, out = values["model"], values["out"]
    folder = snapshot_download(repo, allow_patterns="trunk/*")
    values["trunk"] = AutoModelForCausalLM.from_pretrained(f"{folder}/trunk").eval()
    exec(second.replace("trunk.generate(", "again = trunk.generate("), values)
    return {
        "streams": len(out.streams[0]),
        "threshold": model.generation_config.agreement_threshold,
        "same": torch.equal(out.sequences, values["again"]),
    }


def change_trunk(repo: str) -> None:
    """A new commit of a trunk: what was likely becomes unlikely."""
    trunk = LlamaForCausalLM.from_pretrained(repo)
    with torch.no_grad():
        trunk.lm_head.weight.neg_()
    trunk.push_to_hub(repo)


def start_training(trunk: str, folder: str, include_trunk: bool = False, **arguments) -> dict:
    """What the training recipe builds from its arguments, saved; whether its trunk is that of `owner/trunk`."""
    from modeling_pdt import PDTAdapterConfig
    from recipes.train import load_model
    from trainer_pdt.arguments import ModelArguments

    adapter = PDTAdapterConfig(notes_dim=16, adapter_bottleneck=8)
    model, tokenizer = load_model(ModelArguments(trunk=trunk, block_size=4, **arguments), adapter)
    model.save_pretrained(folder, include_trunk=include_trunk)
    tokenizer.save_pretrained(folder)
    first = LlamaForCausalLM.from_pretrained("owner/trunk").lm_head.weight
    return {"first": torch.equal(model.trunk.lm_head.weight, first), "trunk_revision": model.config.trunk_revision}


def decode(model: str, folder: str, *words: str) -> list:
    """The decoding recipe; the sections it wrote."""
    from recipes import decode as recipe
    from trainer_pdt.telemetry import read_json

    path = Path(folder) / "decoded.json"
    options = ["--plan", "none", "--temperature", "0", "--max_new_tokens", "6", "--manifest", str(path)]
    recipe.main(["--model", model, "--prompt", "Describe the town of Velmar.", *options, *words])
    return read_json(path)["sections"]


def build_dataset(folder: str, repo: str, **options) -> None:
    """The pipeline, to its last stage and on to the Hub."""
    from tests.data_builds import make_builder

    make_builder(Path(folder), push_to_hub=True, hub_dataset_id=repo, **options).run()


def read_dataset(repo: str) -> dict:
    """A stranger's `load_dataset`: types and rows of every split."""
    from datasets import load_dataset

    splits = load_dataset(repo)
    return {name: {"types": str(split.features), "rows": list(split)} for name, split in splits.items()}


def features_of_dataset(repo: str) -> dict:
    """What training makes of a published dataset."""
    from tests.tiny_training import make_maker
    from trainer_pdt.arguments import DataArguments
    from trainer_pdt.features import load_features

    data = DataArguments(dataset_path=repo, train_documents=5, eval_documents=2)
    train, validation = load_features(data, make_maker(0.0), 0)
    return {"train": len(train), "validation": len(validation), "columns": sorted(train.column_names)}
