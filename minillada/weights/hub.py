"""Download a model's data files from the Hugging Face hub, with one line for every way in which that can fail.

`huggingface_hub` does the work: it resumes downloads, keeps the shared cache, and obeys HF_HOME, HF_ENDPOINT, HF_TOKEN
and HF_HUB_OFFLINE.
"""

import re
from pathlib import Path

from tqdm import tqdm

from ..errors import BadInput, BadLuck

# The files that a checkpoint is read from. Code and pickles are not downloaded.
FILES = ["config.json", "generation_config.json", "minillada.json", "vision_config.json", "*.safetensors",
         "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja"]  # fmt: skip


class Quiet(tqdm):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def fetch(repository: str, revision: str | None = None, progress: bool = False) -> Path:
    """Return the local directory of a repository, newest or at a branch, tag or commit. Raises BadInput, BadLuck."""
    if not re.fullmatch(r"(?!runs/)\w[\w.-]*(/\w[\w.-]*)?", repository):
        raise BadLuck(f"{repository!r}: expected a directory or the id of a model on the hub, got neither; check it")
    from huggingface_hub import errors, snapshot_download

    which = {"revision": revision, "allow_patterns": FILES, "ignore_patterns": "*/*"}
    try:
        return Path(snapshot_download(repository, tqdm_class=tqdm if progress else Quiet, **which))
    except (errors.GatedRepoError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as e:
        reason = {"GatedRepoError": "one to ask access for", "RevisionNotFoundError": f"no revision {revision!r}"}
        got = reason.get(type(e).__name__, "none by that name, here or there")
        raise BadInput(f"{repository!r}: expected a model that the hub gives, got {got}; check the name") from None
    except Exception as e:  # of the library, of the HTTP client below it, of the disk
        got = " ".join(str(e).split()).removeprefix("Got: ")[:200] or type(e).__name__
        what = f"{repository!r}: expected a directory here, or the hub or its cache to give it"
        raise BadLuck(f"{what}, got {got}; check the name and the network") from None
