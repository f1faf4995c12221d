"""Render a chat template in a process of its own, because a stranger's template may loop or grow for ever.

`chat.py` runs this file, which reads a job as JSON and writes the answer as JSON. Jinja2's immutable sandbox confines
the template; the system ends the process at a limit of memory and time. Without imports of ours it starts at once.
"""

import json
import os
import sys
import threading
import time

SECONDS = 1  # of computing
MEMORY = 512 << 20  # bytes
LENGTH = 1 << 20  # characters of the result


def limit() -> None:
    """Let the system end this process when it takes too much memory or time."""
    if sys.platform == "win32":
        return limit_windows()
    import resource

    def lower(kind: int, value: int) -> None:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

    lower(resource.RLIMIT_CPU, round(time.process_time() + SECONDS))  # whole seconds
    if sys.platform != "darwin":
        return lower(resource.RLIMIT_AS, MEMORY)

    def watch() -> None:  # the limit of macOS does not hold
        while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MEMORY:  # bytes on macOS
            time.sleep(0.01)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def limit_windows() -> None:
    """Put this process into a job object with a limit on memory and time (learn.microsoft.com: Job Objects)."""
    import ctypes
    from ctypes import c_int64, c_size_t, c_uint32, c_uint64, c_void_p

    class Basic(ctypes.Structure):
        _fields_ = [("process_time", c_int64), ("job_time", c_int64), ("flags", c_uint32), ("least", c_size_t),
                    ("most", c_size_t), ("processes", c_uint32), ("affinity", c_size_t), ("priority", c_uint32),
                    ("scheduling", c_uint32)]  # fmt: skip

    class Extended(ctypes.Structure):
        _fields_ = [("basic", Basic), ("io", c_uint64 * 6), ("process_memory", c_size_t), ("job_memory", c_size_t),
                    ("process_peak", c_size_t), ("job_peak", c_size_t)]  # fmt: skip

    wanted = Extended(process_memory=MEMORY)
    wanted.basic.flags = 0x100 | 0x2  # of a process: its memory, its time
    wanted.basic.process_time = int((time.process_time() + SECONDS) * 1e7)
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.CreateJobObjectW.restype = kernel.GetCurrentProcess.restype = c_void_p
    job = c_void_p(kernel.CreateJobObjectW(None, None))
    done = kernel.SetInformationJobObject(job, 9, ctypes.byref(wanted), ctypes.sizeof(wanted))
    if not done or not kernel.AssignProcessToJobObject(job, c_void_p(kernel.GetCurrentProcess())):
        raise ctypes.WinError(ctypes.get_last_error())


def render(template: str, context: dict) -> str:
    """Return the text that a template makes, with the settings that Hugging Face templates are written for."""
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    limit()
    given = {"undefined": StrictUndefined, "extensions": [loopcontrols]}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, **given)
    environment.globals["raise_exception"] = refuse
    text = ""
    for piece in environment.from_string(template).generate(context):
        text += piece
        if len(text) > LENGTH:
            raise TemplateError(f"more than {LENGTH} characters")
    return text


def main() -> None:
    """Answer one job: {"text": …} or {"error": …}."""
    job = json.load(sys.stdin.buffer)
    sys.path[:] = job["path"]
    try:
        answer = {"text": render(job["template"], job["context"])}
    except MemoryError:
        answer = {"error": f"one that takes more than {MEMORY >> 20} MB"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    json.dump(answer, sys.stdout)  # in ASCII


if __name__ == "__main__":
    main()
