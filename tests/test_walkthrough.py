"""The walkthrough: how a page is parsed, run and compared; and, slowly, the pages themselves."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from experiments import walkthrough

NAME = Path("page.md")
PAGE = """# Title

```python
x = 2.0
print(f"x is {x:.1f}")
```
```text
x is 2.0
```

```python
print("accuracy", x / 2.5)
print("done")
```

```text roughly
accuracy 0.9
done
```
"""


def test_a_page_runs_and_its_numbers_are_compared_within_their_tolerance():
    assert walkthrough.run(PAGE, NAME, {}) == (PAGE.replace("accuracy 0.9", "accuracy 0.8"), [])
    for old, new, problem in (
        ("x is 2.0\n", "x is 2.2\n", "page.md:8: the page says 2.2, the code 2.0"),
        ("0.9", "0.5", "page.md:17: the page says 0.5, the code 0.8"),
        ("done\n```", "gone\n```", "page.md:17: the page says 'accuracy 0.9\\ngone\\n', the code"),
        ("done\n```", "```", "page.md:17: the page says 'accuracy 0.9\\n', the code"),
    ):
        _, [found] = walkthrough.run(PAGE.replace(old, new), NAME, {})
        assert found.startswith(problem)


def test_a_failing_block_names_its_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as error:
        walkthrough.run(PAGE.replace("x / 2.5", "x / 0"), NAME, {})
    with pytest.raises(ValueError, match="page.md: a block is not closed"):
        walkthrough.run(PAGE.removesuffix("```\n"), NAME, {})
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == ("page.md", 12)


@pytest.mark.slow
def test_every_number_of_the_pages_comes_out(tmp_path):
    shutil.copytree(ROOT, tmp_path / "repo", ignore=shutil.ignore_patterns(".git", "runs"))
    command = [sys.executable, "-m", "experiments.walkthrough"]
    done = subprocess.run(command, cwd=tmp_path / "repo", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    figure = tmp_path / "repo" / "docs" / "walkthrough" / "compare.png"
    assert figure.stat().st_size > 5000
