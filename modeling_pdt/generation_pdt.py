"""Parallel decoding."""


def parallel_generate(model, input_ids, **kwargs):
    """Placeholder until the loop lands."""
    raise NotImplementedError
