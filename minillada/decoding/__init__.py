"""Ways to decode beyond LLaDA's own, one published method a file.

Each file adds names to the tables of `strategies.py` when it is imported, and `minillada/__init__.py` imports them all:
so the course never imports one of them. To add a method, write one file and name it here. A file imports the course and
nothing else.
"""

from . import (  # noqa: F401 importing them registers them
    entropy_bound,
    fast_dllm,
    fast_draw,
    klass,
    narrow,
    random_remask,
    refresh,
    remdm,
    scores,
    wino,
)  # fmt: skip
