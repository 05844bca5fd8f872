"""Samples: where they come from (``articles``, ``lra``) and how a model reads them (``prompts``)."""
