"""Baselines without drafts: each writes what a slower, independent way of computing the same rows writes."""

import pytest
import torch

from modeling_pdt.plan import StreamPlan
from tests.tiny_baselines import OPTIONS, greedy, make_request, sliding_model, tiny_model, tokenizer, whole_model
from trainer_pdt.baselines import METHODS, Request, Tools, run_method
from trainer_pdt.baselines import skeleton as skeleton_module
from trainer_pdt.baselines.answer import Call
from trainer_pdt.baselines.eagle import EagleHead
from trainer_pdt.baselines.medusa import MedusaHeads
from trainer_pdt.baselines.meter import CallMeter
from trainer_pdt.manifest import check_manifest, decode_manifest

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "seed": 3}


def run(name, model, request, tools=None, **options):
    return run_method(name, model, tokenizer(), request, {**OPTIONS, **options}, tools)


@pytest.mark.parametrize(
    ("make", "sampling"), [(tiny_model, SAMPLED), (sliding_model, {"do_sample": False})], ids=["sampled", "sliding"]
)
def test_independent_streams_are_parallel_decoding_without_adapters(make, sampling):
    model, request = make(), make_request(1)
    with model.disable_adapter():
        prompt = tokenizer()([request.prompt], return_tensors="pt", add_special_tokens=False)["input_ids"]
        expected = model.generate(
            prompt,
            tokenizer=tokenizer(),
            num_streams=3,
            stream_prefixes=request.headers,
            agreement_threshold=None,
            return_dict_in_generate=True,
            **{**OPTIONS, **sampling},
        )
    for name in ("independent", "shared_prefill"):
        written = run(name, model, request, **sampling).output
        assert [s.token_ids for s in written.streams[0]] == [s.token_ids for s in expected.streams[0]]
        assert torch.equal(written.merged[0], expected.merged[0])
        assert torch.equal(written.sequences, expected.sequences)


def test_the_shared_prompt_is_read_once():
    model, request = tiny_model(), make_request()
    apart, shared = (run(name, model, request, max_new_tokens=2) for name in ("independent", "shared_prefill"))
    prompt = len(tokenizer()(request.prompt, add_special_tokens=False)["input_ids"])
    assert apart.positions - shared.positions == 2 * (prompt - 1)
    assert shared.output.trace.calls == apart.output.trace.calls == 1


def test_sequential_sections_read_the_earlier_ones():
    model, request = tiny_model(), make_request()
    written = run("sequential", model, request).tokens
    prefix = tokenizer()(request.prompt, add_special_tokens=False)["input_ids"]
    for header, tokens in zip(request.headers, written, strict=True):
        prefix += tokenizer()(header, add_special_tokens=False)["input_ids"]
        assert tokens == greedy(model.trunk, prefix, OPTIONS["max_new_tokens"])
        prefix += tokens + ([] if tokens[-1] == tokenizer().eos_token_id else [tokenizer().eos_token_id])


def test_full_text_reads_the_siblings_up_to_the_round_before():
    model, request = tiny_model(), make_request()
    result = run("full_text", model, request)
    prompt = tokenizer()(request.prompt, add_special_tokens=False)["input_ids"]
    headers = [tokenizer()(header, add_special_tokens=False)["input_ids"] for header in request.headers]
    block, sections = model.config.block_size, [[] for _ in headers]
    for _ in range(-(-OPTIONS["max_new_tokens"] // block)):
        before = [list(section) for section in sections]
        for own, section in enumerate(sections):
            if section[-1:] == [tokenizer().eos_token_id]:
                continue
            others = [headers[k] + before[k] for k in range(len(headers)) if k != own and before[k]]
            prefix = prompt + [token for text in others for token in text] + headers[own] + before[own]
            section += greedy(model.trunk, prefix, min(block, OPTIONS["max_new_tokens"] - len(section)))
    assert result.tokens == sections
    assert [len(stream.blocks) for stream in result.output.streams[0]] == [-(-len(s) // block) for s in sections]


@pytest.mark.slow
def test_skeleton_of_thought_writes_its_own_outline(monkeypatch):
    model, request = whole_model(), make_request()
    wrong = Request(request.request, (StreamPlan("Nothing", ("such",)),))
    result = run("skeleton", model, wrong)
    own, given = result.request, tokenizer()(request.request, add_special_tokens=False)["input_ids"]
    outline = tokenizer()(own.prompt, add_special_tokens=False)["input_ids"][len(given) :]
    assert greedy(model.trunk, given, 8) == outline[:8]
    assert len(own.lines) > 1
    assert result.tokens == run("independent", model, own).tokens
    assert result.output.trace.settings["baseline"] == {"name": "skeleton", "router": "none", "points": True}
    monkeypatch.setattr(Request, "outlined", lambda *_: own)
    for answer, same in ((True, "independent"), (False, "sequential")):
        monkeypatch.setattr(skeleton_module, "is_for_points", lambda call, answer=answer: answer)
        routed = run("skeleton", model, wrong, Tools(router="ask"), max_new_tokens=3)
        assert routed.tokens == run(same, model, own, max_new_tokens=3).tokens
        assert routed.output.trace.settings["baseline"]["points"] is answer


def test_the_router_follows_the_likelier_reply(monkeypatch):
    model, request = tiny_model(), make_request()
    call, question = Call("skeleton", model, tokenizer(), request, OPTIONS, CallMeter(model.trunk)), request.request
    replies, means = (" the mayor", " crop barley river"), []
    monkeypatch.setattr(skeleton_module, "ROUTER_QUESTION", "{request}")
    for reply in replies:
        given, wanted = (
            tokenizer()(text, add_special_tokens=False)["input_ids"] for text in (question.strip(), reply)
        )
        with torch.no_grad():
            log = model.trunk(torch.tensor([given + wanted])).logits[0].log_softmax(-1)
        means.append(sum(float(log[len(given) + k - 1, token]) for k, token in enumerate(wanted)) / len(wanted))
    for order in (1, -1):
        monkeypatch.setattr(skeleton_module, "ROUTER_REPLIES", replies[::order])
        assert skeleton_module.is_for_points(call) == (order * (means[0] - means[1]) > 0)


def test_every_method_leaves_a_manifest_of_the_same_schema(monkeypatch):
    model, request = tiny_model(), make_request()
    monkeypatch.setattr(Request, "outlined", lambda *_: request)
    trunk = model.trunk
    tools = Tools(assistant=trunk, medusa=MedusaHeads.for_trunk(trunk), eagle=EagleHead.for_trunk(trunk).eval())
    for name, method in METHODS.items():
        result = run(name, model, request, tools, max_new_tokens=3)
        trace = result.output.trace.to_manifest()
        texts = [[tokenizer().decode(stream) for stream in result.tokens]]
        check_manifest(decode_manifest(trace, [request.prompt], texts, texts[0][:1]))
        assert trace["model"]["adapter"] == ("default" if method.parallel else None)
        assert trace["settings"].get("baseline", {}).get("name", name) == name
        assert trace["settings"]["bus_lag"] == (model.config.bus_lag if method.parallel else None)
        committed = {}
        for event in trace["events"]:
            if event["kind"] == "commit":
                committed.setdefault(event["stream"], []).extend(event["tokens"])
        assert [committed[stream] for stream in sorted(committed)] == result.tokens
        assert 0 < trace["timings"]["prefill_s"] < trace["timings"]["total_s"] < result.seconds


def test_impossible_requests_are_refused():
    model, request = tiny_model(), make_request()
    with pytest.raises(ValueError, match="method 'medium', allowed: pdt, self_only, sequential"):
        run("medium", model, request)
    with pytest.raises(ValueError, match=r"logits processors \['RepetitionPenaltyLogitsProcessor'\], allowed"):
        run("sequential", model, request, repetition_penalty=1.2)
