"""The page of --explain and a run's page of samples, with the numbers that they carry."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from conftest import generate, random_image

from masking import mask_prompt
from papo import preset
from support import pages
from support.batch import Example, seeded


def explained(policy, example, tmp_path):
    """The page's path and data, the group, and the views."""
    prompt = policy.encoder.encode(example)
    [group] = generate(policy, [prompt], 1, max_new_tokens=5)
    algo = preset("papo_g")
    views = [mask_prompt(prompt, algo, policy.encoder, seeded("page", i)) for i in range(3)]
    page = pages.explain(policy, group, views, 256, tmp_path / "page.html")
    return page, data_of(page), group, views


def data_of(page):
    return json.loads(re.search(r"^const data = (.*);$", page.read_text("utf-8"), re.M)[1])


def test_the_page_carries_the_policys_log_probs(varied_policy, tmp_path):
    """Two images of different shape: 3 x 4 and 4 x 2 image tokens."""
    images = [random_image(28 * 4, 28 * 3), random_image(28 * 2, 28 * 4, 1)]
    hostile = '<image>and <image>: </script><script>alert("1")</script> $data?'
    example = Example(hostile, "<3>", images)
    page, data, group, views = explained(varied_policy, example, tmp_path)
    text = page.read_text("utf-8")
    assert text.count("</script>") == 1 and "http" not in text
    assert data["question"] == hostile.replace("<image>", "") and data["answer"] == "<3>"

    def under(view):
        with torch.no_grad():
            return varied_policy.log_probs([replace(group, view_pixel_values={"x": view})], "x")[0]

    clean = under(group.prompt.pixel_values)
    masked = torch.stack([under(pixels) for pixels in views]).mean(0)
    assert [token["clean"] for token in data["tokens"]] == pytest.approx(clean.tolist(), abs=1e-5)
    assert [token["masked"] for token in data["tokens"]] == pytest.approx(masked.tolist(), abs=1e-5)
    first, second = data["images"]
    assert (first["rows"], first["columns"], len(first["drops"])) == (3, 4, 12)
    assert (second["rows"], second["columns"], len(second["drops"])) == (4, 2, 8)
    for token, drops in ((7, first["drops"][7]), (13, second["drops"][1])):
        black = group.prompt.pixel_values.clone()
        black[4 * token : 4 * token + 4] = varied_policy.encoder.black_patch
        assert drops == pytest.approx((clean - under(black)).tolist(), abs=1e-3)
    assert (torch.tensor(first["drops"]).abs() > 0.002).any()


def test_large_images_have_cells_of_several_tokens():
    """5 x 7 image tokens in cells of 3 x 3; those at the edge are smaller."""
    cells = pages.cells_of([(5, 7)], 3)
    assert [len(cell) for cell in cells] == [9, 9, 3, 6, 6, 2]
    assert cells[5].tolist() == [27, 34]


def test_the_masked_image_is_the_one_the_model_gets(varied_policy):
    encoder = varied_policy.encoder
    example = Example("<image>?", "1", [random_image(28 * 4, 28 * 3)])
    prompt = encoder.encode(example)
    masked = mask_prompt(prompt, preset("papo_g"), encoder, seeded(0))
    [view] = pages.images_of(encoder, masked, [(3, 4)])
    pixel_values = encoder.image_processor(images=[view], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, masked)


def test_samples_show_the_first_middle_and_last_evaluation(tmp_path):
    """Of each question that is still there; hostile text is escaped."""
    steps, hostile = (0, 10, 20, 30, 40), "<script>x</script>"
    of_row = {"set": "general", "row": 0, "id": "0", "label": "3", "predict": hostile}
    lines = [of_row | {"step": step, "accuracy": step / 40} for step in steps]
    lines.append(lines[-1] | {"row": 5, "predict": "lost"})
    examples = {0: Example("<image>How many <b> \ud800?", "<3>", [random_image(28, 28)])}

    def show(found):
        find = lambda line: found.get(line["row"])  # noqa: E731
        return pages.samples(lines, find, "a & b", tmp_path / "a.html")

    assert show({}) is None and not (tmp_path / "a.html").exists()
    text = show(examples).read_text("utf-8")
    escaped = "&lt;script&gt;x&lt;/script&gt;"
    assert re.findall(r"<b>step (\d+) (.*?)</b><pre>(.*?)</pre>", text) == [
        ("0", "✗", escaped),
        ("20", "accuracy 0.50", escaped),
        ("40", "✓", escaped),
    ]
    assert text.count("<img ") == 1 and "Answer: &lt;3&gt;" in text and "a &amp; b" in text
    assert "lost" not in text and "http" not in text and "<script" not in text


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_runs_the_page(varied_policy, tmp_path):
    """Hovering over a token marks it, and colours every part of the image."""
    example = Example("<image>?", "1", [random_image(84, 56)])
    page, data, _, _ = explained(varied_policy, example, tmp_path)
    hovered = page.read_text("utf-8") + "<script>spans[1].onmouseenter()</script>"
    page.write_text(hovered, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    command = [CHROMIUM, *flags.split(), "--dump-dom", f"file://{page}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert dom.count('class="shown"') == 1
    assert len(re.findall("<i [^>]*background: rgba", dom)) == len(data["images"][0]["drops"])
