"""Other ways of answering the same request with the same trunk and sampler, to set parallel decoding beside."""

from .answer import Answer, Request
from .methods import METHODS, Run, Tools, run_method

__all__ = ["METHODS", "Answer", "Request", "Run", "Tools", "run_method"]
