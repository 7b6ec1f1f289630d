"""`eval.search` and the README's example, on a finished run."""

import re
import subprocess
import sys

from tests.commands import ROOT, command, finish


def test_it_shows_the_expansion_and_both_rankings(smoke):
    workdir, _ = smoke
    output = finish(
        command("eval.search", f"--workdir={workdir}", "scale the gradient", "--count=3")
    )
    for part in ("expansion:", "query alone", "query + expansion", "search", "write passages"):
        assert part in output


def refused(*arguments: str) -> str:
    process = command("eval.search", *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    return output


def test_mistakes_get_one_line(smoke, tmp_path):
    assert "not a finished run" in refused(f"--workdir={tmp_path}", "query")
    assert "missing" in refused(f"--workdir={smoke[0]}")
    assert "empty" in refused(f"--workdir={smoke[0]}", "  ")
    assert "--workdir" in refused("query")


def test_the_readme_s_example_runs(smoke):
    workdir, _ = smoke
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    code = code.replace("runs/quickstart", str(workdir))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    texts = ("Pads an array.", "Sorts a list in place.", "Computes the inverse of a matrix.")
    assert result.stdout.strip() in texts
