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
    parts = walkthrough.parse(PAGE)
    printed = walkthrough.run(parts, NAME, {})
    assert walkthrough.differences(parts, printed, NAME) == []
    assert walkthrough.write(parts, printed) == PAGE.replace("accuracy 0.9", "accuracy 0.8")
    wrong = walkthrough.parse(PAGE.replace("x is 2.0\n", "x is 2.2\n"))
    [problem] = walkthrough.differences(wrong, printed, NAME)
    assert problem == "page.md:8: the page says 'x is 2.2', the code 'x is 2.0'"
    for old, new in (("0.9", "0.5"), ("done\n```", "gone\n```"), ("done\n```", "```")):
        other = walkthrough.parse(PAGE.replace(old, new))
        assert len(walkthrough.differences(other, printed, NAME)) == 1, (old, new)


@pytest.mark.slow
def test_every_number_of_the_pages_comes_out(tmp_path):
    shutil.copytree(ROOT, tmp_path / "repo", ignore=shutil.ignore_patterns(".git", "runs"))
    command = [sys.executable, "-m", "experiments.walkthrough"]
    done = subprocess.run(command, cwd=tmp_path / "repo", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    figure = tmp_path / "repo" / "docs" / "walkthrough" / "compare.png"
    assert figure.stat().st_size > 5000
