"""Turn a list of `Step`s into something to look at.

`terminal.py` draws them while they happen, `trace.py` makes events of them, `page.py` a web page, an animation or a
picture of those, and `plots.py` the curve of a training. Files here import the course, `text/` and floor 0.
"""
