"""The README's Python example runs as it stands, on the embedded traces in place of the reader's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {"my_store": str(sample_store_path()), "llama-h100-tp2": TARGET}
    names |= dict(zip(("llama-a100", "llama-h100", "mixtral-h100"), DONORS, strict=True))
    for theirs, ours in names.items():
        assert f'"{theirs}"' in example
        example = example.replace(f'"{theirs}"', repr(ours))
    scope: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), scope)  # the README is part of the repository
    printed = capsys.readouterr().out
    assert f"{TARGET}: " in printed
    assert "--latency-model trained-physics" in printed
    assert {"mean_s", "sd_s", "q2.5_s", "q50_s", "q97.5_s"} <= set(scope["predictions"])


def test_every_make_target_and_file_named_exists() -> None:
    text = README.read_text(encoding="utf-8")
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)) | {"demo", "test"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"\]\(((?:docs|models|benchmarks|reports)/[^)#]+)\)", text):
        assert (README.parent / path).exists(), path
    for path in re.findall(r"`((?:docs|models|benchmarks|reports|hfdtl_bayes|\.ci)/[\w./-]*\w)`", text):
        assert (README.parent / path).exists() or path.startswith("reports/"), path
