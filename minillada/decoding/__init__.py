"""Ways to decode beyond LLaDA's own, one published method a file.

Each file adds names to the tables of `strategies.py` when it is imported, so the course imports none of them. To add a
method, write one file, which imports the course alone, and name it here. `llama_cpp.py` is not imported before it is
needed: it is no method but a mask predictor, which evaluates a GGUF file with llama.cpp.
"""

from . import (  # noqa: F401
    blocks,  # an exact cache for block models
    entropy_bound,  # EB: commit together what is nearly certain
    exact,  # ancestral, first-hitting: samples of the model's own distribution
    fast_dllm,  # threshold, factor; prefix and dual cache
    fast_draw,  # tokens drawn with few random numbers
    graphs,  # evaluations recorded on a GPU
    klass,  # commit what is sure and steady
    llada2,  # LLaDA2.0 and 2.1: what is sure, block by block; edits
    narrow,  # no queries that nobody asks for
    random_remask,  # take back by chance
    refresh,  # dLLM-Cache: compute again what has probably changed
    remdm,  # take back and keep the distribution
    scores,  # margin, entropy
    speculate,  # draft a block, verify it token by token
    wino,  # take back what the rest of the text does not support
)
