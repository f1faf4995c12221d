"""Text: everything between a file of text and ids. Imports errors.py and files.py alone.

tokenizer.py turns text into ids and back; chat.py turns messages into ids, and render.py runs a chat template in a
process of its own. corpora.py reads text, ids.py keeps its ids on disk and draws batches. tales.py makes stories of
known entropy, tasks.py makes toy tasks and checks answers, which are strings: nothing here calls a model.
"""
