"""support/data.py: the forms of rows and images, the ways they can be broken, and the rounds."""

import base64
import io
import json
import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, lines_with, on_ranks
from PIL import Image

from support import StepError, data
from support.run_folder import keep_checksums

RED, BLUE = (250, 0, 0), (0, 0, 250)


def to_bytes(image: Image.Image, form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def plain(size=(40, 30), color=RED) -> bytes:
    return to_bytes(Image.new("RGB", size, color))


def noise(size=(200, 200), form="PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return to_bytes(Image.fromarray(pixels), form)


def truncated(image: bytes) -> bytes:
    """The header is complete and the pixels are not."""
    return image[: len(image) // 2]


def row(image=None, **changes) -> dict:
    images = [plain() if image is None else image]
    return {"problem": "<image>How many?", "answer": "3", "images": images} | changes


def text(i, **more) -> dict:
    return {"problem": f"What is {i} + 0?", "answer": str(i), **more}


def usable(table, folder=Path("."), **options) -> data.Rows:
    located = [(table, index, folder) for index in range(len(table))]
    return data.usable_rows("mine", located, **options)


def read(image: Image.Image, form="PNG", **options) -> Image.Image:
    [result] = usable([row(to_bytes(image, form, **options))])[0].images
    assert result.mode == "RGB"
    return result


def is_red(image: Image.Image) -> bool:
    middle = image.getpixel((image.width // 2, image.height // 2))
    return image.mode == "RGB" and max(abs(a - b) for a, b in zip(middle, RED, strict=True)) < 10


def answers(rows) -> list[str]:
    return [example.answer for example in rows]


# ------------------------------------------------------------------------------------------- images


def test_image_forms(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(plain())
    name, encoded = "images/a.png", base64.b64encode(plain()).decode()
    forms = [
        [plain()],
        [{"bytes": plain(), "path": "elsewhere.png"}],
        [{"bytes": None, "path": name}],
        [str(tmp_path / name)],
        [Image.new("RGB", (40, 30), RED)],
        name,
        {"path": name},
        encoded,
        [{"bytes": encoded}],
        encoded.rstrip("=")[:76] + "\n" + encoded.rstrip("=")[76:],  # wrapped, without padding
        [f"data:image/png;base64,{encoded}"],
    ]
    rows = usable([row(images=images) for images in forms], tmp_path)
    assert len(rows) == len(forms)
    assert all(is_red(image) for example in rows for image in example.images)


@pytest.mark.parametrize(
    "column", "image Image IMAGES image_path imagePath image_paths img picture file_name".split()
)
def test_columns_of_images(tmp_path, column):
    """One image or a list; a question without a marker gets one per image in front."""
    (tmp_path / "a.png").write_bytes(plain())
    table = [{"question": "How many?", "answer": 1, column: "a.png"}, {column: "b.png"} | row()]
    table.append({"question": "How many?", "answer": 1, column: ["a.png", "a.png"]})
    one, known, two = usable(table, tmp_path)
    assert (one.question, two.question) == ("<image>How many?", "<image><image>How many?")
    assert len(known.images) == 1  # `images` goes before other columns
    assert all(map(is_red, [*one.images, *known.images, *two.images]))
    assert one.columns == two.columns == {}
    assert usable([text(1) | {column: None}])[0].images == []


@pytest.mark.parametrize(
    "value",
    ["a.png", "https://host/a.JPG?size=1", plain(), {"bytes": plain()}, [{"path": "b.webp"}]],
)
def test_an_image_that_is_not_read_refuses_its_row(value, capsys):
    table = [text(0, scan=value), row(scan=value), text(2, scan=7, file_name="rows.json")]
    rows = usable(table)
    assert rows.skipped == {"unread image": 1}
    assert "row 0 is skipped, unread image: column 'scan' looks" in capsys.readouterr().err
    assert [example.columns for example in rows] == [{}, {"scan": 7, "file_name": "rows.json"}]
    assert rows.summary().startswith("mine: 1 of 2 rows have an image; left out: {'unread image'")


TRANSPARENT = [
    ("RGBA", (*RED, 0), {}),
    ("RGBA", (*RED, 0), {"form": "WEBP", "lossless": True, "exact": True}),
    ("LA", (77, 0), {}),
    ("P", 1, {"transparency": 1}),
    ("P", 1, {"form": "GIF", "transparency": 1}),
    ("RGB", RED, {"transparency": RED}),
    ("L", 77, {"transparency": 77}),
]


@pytest.mark.parametrize("mode, color, options", TRANSPARENT)
def test_transparent_images_are_put_on_white(mode, color, options):
    image = Image.new(mode, (40, 30), color)
    if mode == "P":
        image.putpalette([0, 0, 0, *RED, *BLUE])
    assert read(image, **options).getpixel((9, 9)) == (255, 255, 255)


def test_other_modes_become_rgb():
    assert is_red(read(Image.new("RGBA", (40, 30), (*RED, 255))))
    assert read(Image.new("RGBA", (40, 30), (255, 0, 0, 102))).getpixel((9, 9)) == (255, 153, 153)
    assert is_red(read(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG"))
    assert read(Image.new("L", (40, 30), 77)).getpixel((0, 0)) == (77,) * 3
    assert read(Image.new("1", (40, 30), 1)).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize(
    "stored, expected",
    [
        (np.uint16([0, 77 * 256, 65535]), [0, 77, 255]),
        (np.uint16([0, 2048, 4095]), [0, 128, 255]),  # 12 bits
        (np.uint16([0, 100, 255]), [0, 100, 255]),
        (np.uint16([0, 0, 0]), [0, 0, 0]),
        (np.int32([0, 1, 200_000]), [0, 0, 255]),
        (np.float32([0, 0.5, 1]), [0, 128, 255]),
        (np.float32([0, 0.5, 1.01]), [0, 126, 255]),
        (np.float32([0, 100, 255]), [0, 100, 255]),
        (np.float32([-1, 0, 1]), [0, 128, 255]),
        (np.float32([np.nan, np.inf, 1]), [0, 0, 255]),
    ],
)
def test_deep_images_are_not_black(stored, expected):
    image = read(Image.fromarray(stored[None]), "TIFF")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation_is_applied_and_broken_exif_ignored(form):
    image = Image.new("RGB", (40, 30), RED)
    image.paste(BLUE, (0, 0, 20, 30))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: blue on top
    upright = read(image, form, exif=exif)
    assert upright.size == (30, 40)
    assert upright.getpixel((15, 5))[2] > 200
    assert upright.getpixel((15, 35))[0] > 200
    assert read(image, form, exif=b"Exif\0\0rubbish").size == (40, 30)


# --------------------------------------------------------------------------------------------- rows


def test_several_images_text_only_rows_and_further_columns():
    red, blue = plain(), plain(color=BLUE)
    two = {"problem": "<image>or<image>?", "answer": "a", "level": 3, "id": "x"}
    table = [
        two | {"images": [red, blue], "images_aug": [blue, red]},
        text(1, images=None),
        text(2, images=[], images_aug=[]),
        text(3, images=[None]),
        text(4, image=""),
    ]
    first, *text_only = usable(table)
    assert [is_red(image) for image in first.images] == [True, False]
    assert [is_red(image) for image in first.more_images["images_aug"]] == [False, True]
    assert first.columns == {"level": 3, "id": "x"}
    assert len(text_only) == 4
    assert all(example.images == [] and example.more_images == {} for example in text_only)
    assert all("<image>" not in example.question for example in text_only)


def test_answers_become_text_and_ids_are_kept():
    stored = ["x", 3, 3.0, 2.5, True, 0, -1, False]
    rows = usable([{"problem": "?", "answer": answer} for answer in stored])
    assert answers(rows) == ["x", "3", "3", "2.5", "True", "0", "-1", "False"]
    rows = usable([text(0), text(0, id=17), text(0, id="geo_1")])
    assert [example.id for example in rows] == ["0", "17", "geo_1"]


def test_sharegpt_rows():
    user = {"role": "user", "content": "<image>How many?"}
    assistant = {"role": "assistant", "content": "3"}
    shared = {"images": [plain()], "id": "s1"}
    [example] = usable([shared | {"messages": [user, assistant]}])
    assert (example.question, example.answer, example.id) == ("<image>How many?", "3", "s1")
    assert is_red(example.images[0])
    wrong = [[user], [user, assistant] * 2, [assistant, user], [user, user, assistant], [], "text"]
    with pytest.raises(data.DataError, match=r"none of its 6 rows can be used \(messages 6\)"):
        usable([shared | {"messages": turns} for turns in wrong])


BROKEN = {
    "not a row": 7,
    "not JSON": '{"problem": "cut o',
    "missing column": {"problem": "?", "text": "?"},
    "empty question": {"problem": " ", "answer": "1"},
    "empty answer": {"problem": "?", "answer": float("nan")},
    "answer is not text": {"problem": "?", "answer": ["1"]},
    "question is not text": {"problem": {"text": "?"}, "answer": "1"},
    "answer is not valid Unicode": {"problem": "?", "answer": "3 \ud83d"},
    "markers": row(problem="<image><image>?"),
    "images_aug": row(images_aug=[plain()] * 2),
    "broken image": row("nowhere.png"),
    "aspect ratio": row(plain((4020, 20))),
    "messages": {"messages": [{"role": "user", "content": "?"}]},
}


def test_broken_rows_are_skipped_and_the_first_of_each_kind_is_reported(capsys):
    table = [*BROKEN.values(), text(0), *BROKEN.values(), text(1)]
    rows = usable(table)
    assert rows.skipped == Counter({kind: 2 for kind in BROKEN})
    assert rows.numbers == [len(BROKEN), len(table) - 1]
    assert answers(rows) == ["0", "1"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(BROKEN)
    for number, (kind, line) in enumerate(zip(BROKEN, lines, strict=True)):
        assert line.startswith(f"mine: row {number} is skipped, {kind}: ")
        assert len(line) < 320
    assert usable(table, limit=1).numbers == rows.numbers[:1]
    assert usable(table, limit=0).numbers == rows.numbers


ENCODED = base64.b64encode(noise()).decode()


@pytest.mark.parametrize(
    "value, words",
    [
        (row("a\0b.png"), "a\0b.png"),
        (row(plain()[:20]), "20 bytes"),
        (row(ENCODED[:400] + "?"), "iVBORw0KGgo"),
        (row("data:image/png;base64,???"), "Only base64 data is allowed"),
        (row(problem="<image><image>?"), "2 <image> markers for 1 images: <image><image>?"),
    ],
)
def test_the_report_names_the_value(value, words, capsys):
    assert len(usable([value, text(1)])) == 1
    assert words in capsys.readouterr().err


def test_a_set_without_usable_rows():
    with pytest.raises(data.DataError) as caught:
        usable([BROKEN["markers"], BROKEN["empty answer"], BROKEN["markers"]])
    counts = "none of its 3 rows can be used (markers 2, empty answer 1): mine: row 0"
    assert str(caught.value).startswith(f"data 'mine': {counts}")
    with pytest.raises(data.DataError, match=r"none of its 0 rows can be used: no rows"):
        usable([])


PAIRS = {"images_pos": "image_noisy", "images_neg": "image_aug"}  # ours, and as released


def test_further_image_columns_under_both_names(capsys):
    """A column that is asked for must be there, for rows with images; others are not read."""
    red, blue = plain(), plain(color=BLUE)
    ours = row(red, images_pos=[red], images_neg=[blue])
    released = row(red, image_noisy=red, image_aug=blue)  # one image, not a list
    table = [ours, released, text(1), row(red, images_pos=[red]), row(red, image_aug=[blue, blue])]
    rows = usable(table, columns=tuple(PAIRS))
    assert rows.numbers == [0, 1, 2]
    error = capsys.readouterr().err
    assert "row 3 is skipped, missing column: images_neg or image_aug; the row has" in error
    for example in (rows[0], rows[1]):
        found = {name: is_red(images[0]) for name, images in example.more_images.items()}
        assert found == {"images_pos": True, "images_neg": False}
        assert example.columns == {}
    assert all(usable(table)[i].more_images == {} for i in range(5))
    with pytest.raises(data.BadRowError, match="2 images in images_neg for 1 images"):
        data.parse_row(table[4], 0, columns=("images_neg",))
    with pytest.raises(data.DataError, match="toy has no image column 'depth': choose from images"):
        data.load("toy", columns=("depth",))


def test_pixels_that_turn_out_broken(tmp_path):
    """Headers are all that is read before a row is asked for."""
    (tmp_path / "a.png").write_bytes(plain())
    images = [truncated(noise()), truncated(noise(form="JPEG")), "a.png", noise()]
    rows = usable([row(image) for image in images], tmp_path)
    assert len(rows) == 4
    (tmp_path / "a.png").unlink()
    for i in range(3):
        with pytest.raises(data.BadRowError, match="broken image"):
            rows[i]
    assert rows[3].images[0].size == (200, 200)


def test_overlong_prompts_are_found_from_headers(capsys):
    measured = []

    def length(question, sizes):
        measured.append((question, sizes))
        if "spells" in question:
            raise ValueError("the question spells out an image token")
        return len(question) + sum(width * height // 784 for width, height in sizes)

    half = truncated(noise((600, 400)))
    big = row(half, problem="<image>big?", images_aug=[half])
    small = row(plain((28, 28)), problem="small?")
    table = [big, small, text(0), text(1) | {"problem": "spells"}]
    rows = usable(table, length=length, max_prompt_tokens=100)
    assert rows.skipped == {"overlong": 1, "refused": 1}
    assert rows.numbers == [1, 2]
    assert measured[:2] == [("<image>big?", [(600, 400)]), ("<image>small?", [(28, 28)])]
    assert measured[2] == ("What is 0 + 0?", [])
    assert "row 0 is skipped, overlong: 317 prompt tokens, more than 100" in capsys.readouterr().err


def test_the_toy():
    assert len(data.load("toy")) == 4096
    rows = data.load("toy", limit=3, seed=1)
    assert (len(rows), rows.with_image, rows.name) == (3, 3, "toy/train")
    assert rows[2] == data.load("toy", limit=3, seed=1)[2] != data.load("toy", seed=2)[2]
    sets = data.eval_sets("toy")
    assert {name: len(each) for name, each in sets.items()} == {
        "general": 256,
        "vision_dependent": 256,
    }
    assert list(data.eval_sets("toy:grid=4,split=general", limit=5)) == ["general"]
    choices = "'test': choose one of train, general, vision_dependent"
    with pytest.raises(data.DataError, match=choices):
        data.load("toy", "test")


# ------------------------------------------------------------------------------- ranks and resuming

ON_TWO_RANKS = """
import sys; sys.path.insert(0, {root!r})
from support import data, distributed
rank, _, _ = distributed.init_distributed()
read, calls = data.read_image, []
data.read_image = lambda *args, **options: calls.append(1) or read(*args, **options)
rows = data.load({good!r})
say = lambda text: sys.stdout.write(f"{{rank}} {{text}}\\n") and sys.stdout.flush()  # in one write
say(f"checked {{len(calls)}} usable {{rows.numbers}} {{dict(rows.skipped)}}")
try:
    data.load({bad!r})
except data.DataError as error:
    say(error)
distributed.dist.destroy_process_group()
"""


def test_the_first_rank_checks_the_rows_for_all(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(plain())
    good, bad, script = (tmp_path / name for name in ("good.jsonl", "bad.jsonl", "ranks.py"))
    lines = [json.dumps(row("a.png")), "{", json.dumps(text(1))]
    good.write_text("\n".join(lines))
    bad.write_text("{")
    script.write_text(ON_TWO_RANKS.format(root=str(ROOT), good=str(good), bad=str(bad)))
    done = on_ranks(2, script=script)
    assert done.returncode == 0, done.stderr
    for rank, checked in ((0, 1), (1, 0)):
        assert f"{rank} checked {checked} usable [0, 2] {{'not JSON': 1}}" in done.stdout
        assert f"{rank} data '{bad}': none of its 1 rows can be used (not JSON 1)" in done.stdout
    assert len(lines_with(done.stderr, "row 1 is skipped, not JSON")) == 1

    monkeypatch.setattr(data, "on_first_rank", lambda task: (2, task()[1]))
    with pytest.raises(data.DataError, match="differs between machines: 1 rows here, 2 on the"):
        usable([text(0)])


@pytest.mark.parametrize(
    "edit, changed",
    [
        (lambda rows: rows[1].update(answer="7"), "answer"),
        (lambda rows: rows[0].update(images=["b.png"]), "images"),
        (lambda rows: rows[0].update(level=2), "level"),
        (lambda rows: rows[0].pop("level"), "level"),
        (lambda rows: rows.append(text(9)), "number of rows, problem, answer"),
        (lambda rows: rows.reverse(), "problem, answer"),
        (lambda rows: rows[2].update(answer=""), "number of rows, problem, answer"),
    ],
)
def test_edited_data_is_noticed_by_column(tmp_path, edit, changed):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(plain())
    rows = [row("a.png", level=1), text(1), text(2)]
    keep_checksums(tmp_path, {"mine": usable(rows, tmp_path).checksums}, resuming=False)
    keep_checksums(tmp_path, {"mine": usable(rows, tmp_path).checksums}, resuming=True)
    edit(rows)
    message = rf"data mine has changed since the run began \({changed}\): restore it"
    with pytest.raises(OSError, match=message):
        keep_checksums(tmp_path, {"mine": usable(rows, tmp_path).checksums}, resuming=True)


def test_a_run_without_images_and_its_resumption_on_edited_data(run, tmp_path, capsys):
    """A warning where the objective needs an image; an error for the edit."""
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(text(i)) for i in range(5)))
    flags = f"--data {file} --val_data toy --steps 1"
    for algo, warnings in (("papo_g", 1), ("grpo", 0)):
        out = run(algo, f"{flags} --algo {algo}")
        printed = capsys.readouterr()
        assert f"{file}: 0 of 5 rows have an image; left out: none" in printed.out
        assert "toy/general: 4 of 4 rows have an image" in printed.out
        assert len(lines_with(printed.err, f"no row of {file} has an image")) == warnings
    file.write_text(file.read_text().replace('"4"', '"5"'))
    with pytest.raises(SystemExit):
        run("grpo", f"{flags} --algo grpo --resume {out}")
    [error] = lines_with(capsys.readouterr().err, "error:")
    assert f"data {file} has changed since the run began (answer)" in error


# --------------------------------------------------------------------------------------- the rounds


def texts(n: int) -> data.Rows:
    return usable([text(i) for i in range(n)])


def with_index(example, index):
    return index, example.answer


def rounds_of(rows, size, encode=with_index, **options):
    return data.encode_ahead(rows, encode, data.shuffled_rounds(len(rows), size, **options))


def take(rounds, n: int) -> list:
    taken = [next(rounds) for _ in range(n)]
    rounds.close()
    return taken


def test_the_same_rounds_on_any_number_of_ranks():
    rows = texts(11)
    single = take(rounds_of(rows, 4, seed=5), 6)
    assert single[:2] == [
        [(0, "6"), (1, "3"), (2, "1"), (3, "9")],
        [(0, "4"), (1, "7"), (2, "10"), (3, "2")],
    ]  # published runs have this order
    for world in (2, 3, 5):
        ranks = [take(rounds_of(rows, 4, seed=5, rank=r, world=world), 6) for r in range(world)]
        for number, prompts in enumerate(single):
            shares = [rank[number] for rank in ranks]
            for rank, share in enumerate(shares):
                assert all(index % world == rank for index, _ in share)
            assert sorted(sum(shares, [])) == prompts
    assert take(rounds_of(rows, 4, seed=6), 6) != single


def test_epochs_are_fresh_permutations():
    rounds = take(rounds_of(texts(5), 8), 5)  # longer than an epoch
    order = [answer for prompts in rounds for _, answer in prompts]
    epochs = [tuple(order[i : i + 5]) for i in range(0, 40, 5)]
    assert all(sorted(epoch) == list("01234") for epoch in epochs)
    assert len(set(epochs)) > 4


def test_a_position_resumes_exactly():
    rounds = take(rounds_of(texts(10), 4, seed=1), 7)
    for k in range(7):
        assert take(rounds_of(texts(10), 4, seed=1, position=4 * k), 7 - k) == rounds[k:]


def test_bad_rows_are_left_out_and_counted(capsys):
    table = [text(i) for i in range(8)]
    table[2] = table[5] = row(truncated(noise()))

    def encode(example, index):
        if example.answer == "7":
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return index, example.answer

    rows = usable([BROKEN["markers"], *table])
    capsys.readouterr()
    first, second = take(rounds_of(rows, 8, encode), 2)
    for prompts in (first, second):
        assert sorted(answer for _, answer in prompts) == ["0", "1", "3", "4", "6"]
    usual = [data.shuffled(8, 0, 0).index(i) for i in (0, 1, 3, 4, 6)]
    assert sorted(index for index, _ in first) == sorted(usual)  # the others keep their index
    assert rows.broken == {"broken image": 4, "refused": 2}
    assert rows.skipped == {"markers": 1}
    broken, refused = sorted(capsys.readouterr().err.splitlines())
    starts = ("mine: row 3 is skipped, broken image", "mine: row 6 is skipped, broken image")
    assert broken.startswith(starts)
    assert "mine: row 8 is skipped, absolute aspect ratio" in refused


def test_a_bug_in_encode_is_raised_and_endless_failure_ends():
    def bug(example, index):
        raise TypeError("a bug")

    def refuse(example, index):
        raise ValueError("no such size")

    with pytest.raises(TypeError, match="a bug"):
        next(rounds_of(texts(4), 2, bug))
    failing = rounds_of(texts(4), 2, refuse)
    with pytest.raises(StepError, match="64 prompts in a row cannot be used: refused"):
        for _ in range(100):
            assert next(failing) == []

    def refuse_most(example, index):
        return index if index == 0 else refuse(example, index)

    flaky = take(rounds_of(texts(4), 20, refuse_most), 8)
    assert flaky == [[0]] * 8  # 19 in a row are bad luck


def test_the_next_round_is_encoded_while_the_caller_works():
    first_returned, second_started = threading.Event(), threading.Event()
    lock, calls = threading.Lock(), []

    def encode(example, index):
        with lock:
            calls.append(index)
            is_in_second_round = len(calls) > 4
        if is_in_second_round:
            second_started.set()
            first_returned.wait(60)
        return example

    shares = iter([[(i, i)] * 4 for i in range(4)])
    rounds = data.encode_ahead(texts(16), encode, shares)
    first = next(rounds)  # would never return if it waited for the second round
    assert second_started.wait(60)  # though nobody has asked for it yet
    prompts = [weakref.ref(prompt) for prompt in first]
    del first
    assert all(prompt() is None for prompt in prompts)
    assert len(list(shares)) == 2  # two rounds are in memory, not three
    first_returned.set()
    assert len(next(rounds)) == 4
    rounds.close()


@pytest.mark.parametrize("drop", [False, True])
def test_close_and_del_drop_what_is_queued(drop):
    gate, started = threading.Event(), []

    def encode(example, index):
        started.append(index)
        if index:
            gate.wait(60)
        return index

    rounds = data.encode_ahead(texts(50), encode, [[(0, 0)], [(i, i) for i in range(1, 50)]])
    assert next(rounds) == [0]
    if drop:
        del rounds
    else:
        rounds.close()
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(60)
    assert len(started) <= 1 + data.ENCODERS
