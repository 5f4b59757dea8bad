"""Capture: from a running torch model to groups of a log. The one package that needs torch.

``stage``, ``pipeline`` and ``tokens`` themselves know nothing of torch: they are the seams that
tests drive without it.
"""
