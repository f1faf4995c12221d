"""Download a model's data files from the Hugging Face hub, with one line for every way in which that can fail.

`huggingface_hub` does the work: it resumes downloads, keeps the shared cache, and obeys HF_HOME, HF_ENDPOINT, HF_TOKEN
and HF_HUB_OFFLINE.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from ..errors import BadInput, BadLuck

# The files that a checkpoint is read from. Code and pickles are not downloaded.
FILES = ["config.json", "generation_config.json", "minillada.json", "vision_config.json", "*.safetensors",
         "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja"]  # fmt: skip
# What an endpoint answers and `huggingface_hub` makes names of files in its cache of: headers, and keys of JSON.
HEADERS = ("ETag", "X-Linked-ETag", "X-Repo-Commit", "X-Xet-Hash")
HASHES = ("sha", "oid", "xetHash", "blobId")
PLAIN = r'(W/)?"?[\w-]{1,200}"?'


class Quiet(tqdm):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def hashes(answer: object) -> Iterator[object]:
    """Yield every hash in parsed JSON, at any depth."""
    inner = answer.items() if isinstance(answer, dict) else enumerate(answer) if isinstance(answer, list) else ()
    for key, value in inner:
        if key in HASHES and value is not None:
            yield value
        yield from hashes(value)


def check_answer(response) -> None:
    """Raise BadInput for an answer with a hash that would be a path: huggingface_hub 2.4.0 joins them to the names of
    its cache unseen (file_download._hf_hub_download_to_cache_dir, _snapshot_download), so `../` would leave it."""
    found: list = [response.headers[name] for name in HEADERS if name in response.headers]
    if "/api/" in response.request.url.path:
        response.read()
        with suppress(ValueError, RecursionError):  # no JSON: the library says so itself
            found += hashes(response.json())
    for value in found:
        if not isinstance(value, str) or not re.fullmatch(PLAIN, value):
            raise BadInput(f"hub: expected hashes from {response.request.url.host}, got {value!r:.80}; use another hub")


@contextmanager
def checked() -> Iterator[None]:
    """Look at every answer before the library does."""
    from huggingface_hub import get_session

    client = get_session()  # the one that the library uses, in its threads too
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks["response"], check_answer]}
    try:
        yield
    finally:
        client.event_hooks = hooks


def fetch(repository: str, revision: str | None = None, progress: bool = False) -> Path:
    """Return the local directory of a repository, newest or at a branch, tag or commit. Raises BadInput, BadLuck."""
    if not re.fullmatch(r"(?!runs/)\w[\w.-]*(/\w[\w.-]*)?", repository):
        raise BadLuck(f"{repository!r}: expected a directory or the id of a model on the hub, got neither; check it")
    if revision is not None and (".." in revision or not re.fullmatch(r"\w[\w./-]*", revision)):
        raise BadInput(f"revision: expected a branch, tag or commit, got {revision!r:.80}; check it")
    from huggingface_hub import errors, snapshot_download

    which = {"revision": revision, "allow_patterns": FILES, "ignore_patterns": "*/*"}
    try:
        with checked():
            return Path(snapshot_download(repository, tqdm_class=tqdm if progress else Quiet, **which))
    except (BadInput, BadLuck):
        raise
    except (errors.GatedRepoError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as e:
        reason = {"GatedRepoError": "one to ask access for", "RevisionNotFoundError": f"no revision {revision!r}"}
        got = reason.get(type(e).__name__, "none by that name, here or there")
        raise BadInput(f"{repository!r}: expected a model that the hub gives, got {got}; check the name") from None
    except Exception as e:  # of the library, of the HTTP client below it, of the disk
        got = " ".join(str(e).split()).removeprefix("Got: ")[:200] or type(e).__name__
        what = f"{repository!r}: expected a directory here, or the hub or its cache to give it"
        raise BadLuck(f"{what}, got {got}; check the name and the network") from None
