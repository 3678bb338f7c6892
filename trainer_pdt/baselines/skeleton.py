"""Skeleton-of-Thought (Ning et al. 2024, arXiv 2307.15337), ours: an outline first, then its points in a batch."""

from dataclasses import replace
from typing import Literal

import torch

from .answer import Answer, Call, Request
from .plain import write_independent, write_sequential

Router = Literal["none", "ask"]

ROUTER_QUESTION = (
    "Request: {request}\nCan this request be answered by a list of points that do not depend on each other? Reply "
    "yes or no.\nReply:"
)
ROUTER_REPLIES = (" yes", " no")


def write_skeleton(call: Call, router: Router) -> Answer:
    """
    The trunk writes an outline of its own; then every point is a row of a batch that sees the outline and no sibling.

    Args:
        call (`Call`): Its request's outline is not used.
        router (`str`): `"ask"`: the trunk is asked first, and where it answers no, or its outline has a single point,
            the sections are written one after another. `"none"`: always a batch.
    """
    points = router == "none" or is_for_points(call)
    call.meter.reading()
    request = Request.outlined(call.request.request, call.model, call.tokenizer)
    points = points and (router == "none" or len(request.lines) > 1)
    answer = Answer(replace(call, request=request), router=router, points=points)
    (write_independent if points else write_sequential)(answer)
    return answer


def is_for_points(call: Call) -> bool:
    """The router: whether the trunk finds it likelier that the request is answered by independent points."""
    encode, question = call.tokenizer, ROUTER_QUESTION.format(request=call.request.request.strip())
    prompt = encode(question, add_special_tokens=False)["input_ids"]
    likely = []
    for reply in ROUTER_REPLIES:
        tokens = encode(reply, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + tokens], device=call.model.trunk.device)
        call.meter.reading()
        logits = call.model.trunk(input_ids=ids, logits_to_keep=len(tokens) + 1, use_cache=False).logits[0, :-1]
        likely.append(float(logits.log_softmax(-1).gather(1, ids[0, -len(tokens) :, None]).mean()))
    return likely[0] > likely[1]
