"""The measurements for a GPU run in miniature on a CPU, and say what failed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu


def printed(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_dry_run_prints_a_json_object_a_line_and_ends_well(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "DRY_RUNS", [(4, 32, 4, "dual")])
    monkeypatch.setattr(gpu, "ways", lambda: [{"cache": "dual"}, {"revise": "wino:0.1,0.9"}])
    monkeypatch.setattr(gpu, "ARCHITECTURES", {"experts": gpu.TOY_EXPERTS})
    monkeypatch.setattr(gpu, "train", lambda config: [SimpleNamespace(loss=1.0)])
    found = gpu.main(["--dry", "parity", "bits"])
    lines = printed(capsys)
    assert [line["part"] for line in lines if line["what"] == "done"] == ["ceilings", "parity", "bits"]
    assert [line for line in lines if "error" in line] == [] and found == 0
    assert {"ms", "floor", "x"} <= next(
        line.keys() for line in lines if line["what"] == "8B in int4, 1 x 72, dual, recorded"
    )
    assert any(line["what"] == "experts, same tokens when recorded" and line["same"] == 2 for line in lines)


def test_a_measurement_that_fails_is_a_line_with_an_error_and_the_exit_code_is_1(capsys, monkeypatch):
    def broken(b):
        with b.attempt("this"):
            raise RuntimeError("no such\nkernel")
        b.expect("that", False, got=3)
        b.say("the rest goes on")

    monkeypatch.setattr(gpu, "PARTS", {"ceilings": lambda b: None, "moe": broken})
    assert gpu.main(["--dry"]) == 1
    this, that, rest, _ = printed(capsys)[1:]
    assert (this["what"], this["error"]) == ("this", "RuntimeError: no such kernel")
    assert that["error"] and that["got"] == 3 and "error" not in rest
