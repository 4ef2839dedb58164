"""Placeholder until the page branch is merged."""


def started(request_id, n): ...


def progress(request_id, progress): ...


def ended(request_id, outcome, n_tokens, seconds): ...
