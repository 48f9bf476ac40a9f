"""The examples of docs/python.md, run as printed, in order."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_the_examples_train_save_and_convert(tmp_path, monkeypatch, capsys):
    training, conversion = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    exec(training, names)
    divergences = [float(value) for value in re.findall(r"reverse KL (\S+),", capsys.readouterr().out)]
    assert len(divergences) == 20 and divergences[-1] < 0.8 * divergences[0]
    exec(conversion, names)
    assert (tmp_path / "student-hf" / "config.json").is_file()
    samples = names["samples"]
    for first, second in zip(names["student"].score(samples), names["again"].score(samples), strict=True):
        assert first.tolist() == second.tolist() and first.any()
    untrained = names["build"]("tiny-student", seed=3).score(samples)
    assert untrained[0] != pytest.approx(names["again"].score(samples)[0])
