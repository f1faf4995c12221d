"""Turn a list of `Step`s into something to look at.

`terminal.py` draws them while they happen, `trace.py` makes events of them, `page.py` a web page, an animation or a
picture of those, and `plots.py` the curve of a training. `literate.py` sets the course's files as a page, with the
equations of `equations.py`. Files here import the course, `text/` and floor 0.
"""
