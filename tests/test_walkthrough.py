"""The walkthrough: how its page is parsed, run and compared; and, slowly, the page itself."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from experiments import walkthrough

PAGE = """# Title

```python
x = 2.0
print(f"x is {x:.1f}")
```
```text
x is 2.0
```

Words.

```python
print("accuracy", x / 2.5)
print("done")
```

```text roughly
accuracy 0.9
done
```
"""


def test_a_page_runs_and_its_numbers_are_compared():
    parts = walkthrough.parse(PAGE)
    assert [part.kind for part in parts if part.text.strip()] == [
        "prose",
        "python",
        "text",
        "prose",
        "python",
        "text roughly",
    ]
    printed = walkthrough.run(parts, "page.md")
    assert walkthrough.differences(parts, printed) == []
    wrong = walkthrough.parse(PAGE.replace("x is 2.0\n", "x is 2.2\n"))
    [problem] = walkthrough.differences(wrong, printed)
    assert problem == "line 8: the page says 'x is 2.2', the code 'x is 2.0'"
    for old, new in (
        ("accuracy 0.9", "accuracy 0.5"),
        ("done\n```", "gone\n```"),
        ("done\n```", "```"),
    ):
        other = walkthrough.parse(PAGE.replace(old, new))
        assert len(walkthrough.differences(other, printed)) == 1, (old, new)


def test_what_comes_out_is_written_into_the_page():
    parts = walkthrough.parse(PAGE.replace("x is 2.0", "").replace("accuracy 0.9\n", ""))
    printed = walkthrough.run(parts, "page.md")
    assert walkthrough.write(parts, printed) == PAGE.replace("accuracy 0.9", "accuracy 0.8")
    again = walkthrough.parse(PAGE)
    assert walkthrough.write(again, printed).replace("0.8", "0.9") == PAGE


def test_an_error_names_the_line_of_the_page(tmp_path):
    parts = walkthrough.parse("Text.\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        walkthrough.run(parts, "page.md")
    assert caught.traceback[-1].lineno + 1 == 5
    assert str(caught.traceback[-1].path).endswith("page.md")
    with pytest.raises(ValueError, match="line 2: a python block is not closed"):
        walkthrough.parse("```python\nx = 1\n")


def test_the_notebook_has_every_block_and_no_outputs():
    parts = walkthrough.parse(walkthrough.PAGE.read_text())
    cells = walkthrough.notebook(parts)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == sum(part.kind == "python" for part in parts) >= 12
    assert all(cell["outputs"] == [] for cell in code)
    json.dumps(cells)
    for cell in code:
        compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
def test_every_number_of_the_page_comes_out(tmp_path):
    shutil.copytree(ROOT, tmp_path / "repo", ignore=shutil.ignore_patterns(".git", "runs"))
    done = subprocess.run(
        [sys.executable, "-m", "experiments.walkthrough"],
        cwd=tmp_path / "repo",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for figure in ("views", "log_probs", "gradients", "fifty_steps"):
        assert (tmp_path / "repo" / "docs" / "walkthrough" / f"{figure}.png").stat().st_size > 5000
