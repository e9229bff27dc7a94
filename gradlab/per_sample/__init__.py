"""Gradients of language models, response by response, as inner products that are computed without holding a gradient."""
