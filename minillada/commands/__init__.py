"""Commands: what `python -m minillada NAME` and the scripts do once their options are read.

evaluate.py, tasks.py and app.py are commands; ask.py has a model that answers; cli.py has exit codes, options and the
handling of Ctrl-C. Imports every other room; only the scripts and __main__.py import this one.
"""
