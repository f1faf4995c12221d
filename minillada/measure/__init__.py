"""Measure: how good is a model, and what does it cost?

likelihood.py estimates bounds of likelihoods and perplexities; evaluate.py measures texts, gaps, options and tasks;
twin.py is the same Transformer as an autoregressive model, to compare with; cost.py counts operations. adapter.py holds
what lm_eval.py and opencompass.py share, which hand a model to those two harnesses.

Imports errors.py, files.py, the course, text/ and weights/.
"""
