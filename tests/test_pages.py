"""The page of --explain and a run's page of samples, with the numbers that they carry."""

import html
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


def explained(policy, example, tmp_path, max_cells=256, max_new_tokens=5):
    """The page's path and data, the group, and the views."""
    prompt = policy.encoder.encode(example)
    [group] = generate(policy, [prompt], 1, max_new_tokens=max_new_tokens)
    algo = preset("papo_g")
    views = [mask_prompt(prompt, algo, policy.encoder, seeded("page", i)) for i in range(3)]
    page = pages.explain(policy, group, views, max_cells, tmp_path / "page.html")
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
    masked = torch.stack([under(pixels) for pixels, _ in views]).mean(0)
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


def test_large_images_have_cells_of_several_tokens(varied_policy, tmp_path):
    """5 x 7 image tokens in at most 6 cells of 3 x 3; those at the edge are smaller."""
    grids = [(5, 7)]
    assert pages.cell_side(grids, 6) == 3 and pages.cell_side(grids, 35) == 1
    assert pages.cell_side(grids, 1) == 7 and pages.cell_side([(5, 7), (2, 2)], 1) == 7
    cells = pages.cells_of(grids, 3)
    assert [len(cell) for cell in cells] == [9, 9, 3, 6, 6, 2]
    assert cells[5].tolist() == [27, 34]
    example = Example("<image>?", "1", [random_image(28 * 7, 28 * 5)])
    _, data, _, _ = explained(varied_policy, example, tmp_path, max_cells=6)
    assert (data["images"][0]["side"], len(data["images"][0]["drops"])) == (3, 6)


def test_the_masked_image_is_the_one_the_model_gets(varied_policy):
    encoder = varied_policy.encoder
    example = Example("<image>?", "1", [random_image(28 * 4, 28 * 3)])
    prompt = encoder.encode(example)
    masked, patch_mask = mask_prompt(prompt, preset("papo_g"), encoder, seeded(0))
    [view] = pages.masked_images(encoder, example, patch_mask, [(3, 4)])
    pixel_values = encoder.images(images=[view], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, masked)


# ------------------------------------------------------------------------------------ in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HEADLESS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"


def in_browser(page, actions):
    """What a page looks like after some lines of JavaScript."""
    report = f"""<pre id="report"></pre><script>
    const log = [];
    const colours = frame => frame.cells.map(cell => cell.style.background);
    const look = () => log.push(frames.map(colours));
    {actions}
    find("#report").textContent = JSON.stringify({{
      log, about: find("#about").textContent,
      shown: spans.findIndex(span => span.classList.contains("shown")),
      sources: frames.map(frame => frame.img.src.slice(-40)),
    }});</script>"""
    acted = page.with_name("acted.html")
    acted.write_text(page.read_text("utf-8") + report, encoding="utf-8")
    command = [CHROMIUM, *HEADLESS.split(), "--dump-dom", f"file://{acted}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', done.stdout)[1]))


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_token_lights_the_parts_it_depends_on(varied_policy, tmp_path):
    """Two images: token k depends on cell k mod 6 of image k mod 2 alone."""
    example = Example("<image><image>?", "1", [random_image(84, 56), random_image(84, 56, 1)])
    page, data, _, _ = explained(varied_policy, example, tmp_path)
    tokens = range(12)
    data["tokens"] = [{"text": f" word{k}", "clean": -1.0, "masked": -2.0} for k in tokens]
    for number, image in enumerate(data["images"]):
        depends = [[k % 6 == cell and k % 2 == number for k in tokens] for cell in range(6)]
        image["drops"] = [[2.5 * value for value in cell] for cell in depends]
    text = page.read_text("utf-8")
    old = re.search(r"^const data = .*;$", text, re.M)[0]
    page.write_text(text.replace(old, f"const data = {json.dumps(data)};"), encoding="utf-8")
    actions = "spans[5].onmouseenter(); look(); spans[5].onmouseleave(); look();"
    keys = "for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft', 'ArrowRight'])"
    actions += keys + " document.onkeydown({key, preventDefault() {}});"
    seen = in_browser(page, actions + 'find("#toggle").onclick();')
    hovered, left = seen["log"]
    assert hovered[0] == ["rgba(255, 255, 255, 0.8)"] * 6
    assert hovered[1] == ["rgba(255, 255, 255, 0.8)"] * 5 + ["rgba(255, 255, 255, 0)"]
    assert left != hovered and seen["shown"] == 1
    assert "word1" in seen["about"] and "gain +1.000" in seen["about"]
    assert seen["sources"] == [image["masked"][-40:] for image in data["images"]]


# --------------------------------------------------------------------------------- a run's samples


def sample(step, row, accuracy, text, name="general"):
    question = {"set": name, "row": row, "id": str(row), "label": "3"}
    return {"step": step, "accuracy": accuracy, "predict": text} | question


def test_samples_show_the_first_middle_and_last_evaluation(tmp_path):
    lines = [
        sample(step, row, step / 40, f"{step}/{row}") for step in (0, 20, 40) for row in (0, 1)
    ]
    lines += [sample(10, 0, 1.0, "left out"), sample(30, 0, 1.0, "left out")]
    lines += [sample(40, 0, 1.0, "<script>x</script>", name="other"), sample(40, 5, 1.0, "lost")]
    image = random_image(28, 28)
    examples = {
        ("general", 0): Example("<image>How many <b>?", "<3>", [image]),
        ("general", 1): Example("<image>Before <image>after?", "4 \ud800", [image] * 2),
        ("other", 0): Example("No image?", "5", []),
    }

    def find_example(line):
        return examples.get((line["set"], line["row"]))

    text = pages.samples(lines, find_example, "a & b", tmp_path / "a.html").read_text("utf-8")
    assert re.findall(r"<b>step (\d+) (.*?)</b><pre>(.*?)</pre>", text) == [
        ("0", "✗", "0/0"),
        ("20", "accuracy 0.50", "20/0"),
        ("40", "✓", "40/0"),
        ("0", "✗", "0/1"),
        ("20", "accuracy 0.50", "20/1"),
        ("40", "✓", "40/1"),
        ("40", "✓", "&lt;script&gt;x&lt;/script&gt;"),
    ]
    assert text.count("<img ") == 3
    assert "How many &lt;b&gt;?<br>Answer: &lt;3&gt;" in text and "a &amp; b" in text
    assert "lost" not in text and "http" not in text and "<script" not in text
    assert pages.samples(lines, lambda line: None, "none", tmp_path / "none.html") is None
    assert not (tmp_path / "none.html").exists()
