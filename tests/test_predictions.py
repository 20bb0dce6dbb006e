"""support/predictions.py: PAPO-Eval's files."""

import json
import re

import mathruler.grader

from support.predictions import boxed


def its_rule(records, n):
    """PAPO-Eval's accuracy and mean, written down independently: groups, their counts, the mean of means."""
    groups, means = {}, []
    for r in records:
        said = mathruler.grader.extract_boxed_content(re.sub(r"\s*(<|>|/)\s*", r"\1", r["predict"]))
        right = float(mathruler.grader.grade_answer(said, r["label"]))
        groups.setdefault((r["id"], r["prompt"], r["label"]), []).append(right)
    for group in groups.values():
        assert len(group) % n == 0
        means += [sum(group) / len(group)] * (len(group) // n)
    return 100 * sum(means) / len(means)


def papo_eval_file(path, n=8, repeated=True):
    """Loop after loop over the whole split; two rows are the same question."""
    labels = ["4", "\\frac{1}{2}", "B\n", "90", "90" if repeated else "91"]
    rows = [
        (f"test_{min(i, 3)}", f"system\nYou are.\nuser\nFrage ß {min(i, 3)}?\nassistant\n")
        for i in range(5)
    ]
    said = ["\\boxed{4}", "<think> 1 < 2 </think> \\boxed{0.5}", "it is B", "\\boxed{ 1 / 2 }"]
    said += ["\\boxed{90", "\\boxed{B}"]
    records = []
    for loop in range(n):
        for i, ((name, prompt), label) in enumerate(zip(rows, labels, strict=True)):
            text = {
                "predict": said[(loop * 3 + i) % 6] + (" \\boxed{90}" if i > 2 and loop % 2 else "")
            }
            records.append(
                {"idx": len(records), "id": name, "prompt": prompt, **text, "label": label}
            )
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    return records


def test_boxed():
    assert boxed("<think> 1 </think> \\boxed{a \\frac{1} / {2}} x") == "a \\frac{1}/{2}"
    assert boxed("\\boxed{1") is None and boxed("1") is None
