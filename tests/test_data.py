"""support/data.py: the forms of rows and images, the ways they can be broken, and the rounds."""

import base64
from pathlib import Path

import numpy as np
import pytest
from conftest import answers, image_bytes, write_jsonl
from PIL import Image

from support import StepError, data, toy
from support.run_folder import keep_checksums

RED, BLUE = (250, 0, 0), (0, 0, 250)


def plain(size=(40, 30), color=RED) -> bytes:
    return image_bytes(Image.new("RGB", size, color))


def truncated(size=(200, 200), form="PNG") -> bytes:
    """Noise whose header is complete and whose pixels are not."""
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    image = image_bytes(Image.fromarray(pixels), form)
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
    [result] = usable([row(image_bytes(image, form, **options))])[0].images
    assert result.mode == "RGB"
    return result


def is_red(image: Image.Image) -> bool:
    middle = image.getpixel((image.width // 2, image.height // 2))
    return image.mode == "RGB" and max(abs(a - b) for a, b in zip(middle, RED, strict=True)) < 10


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
        [{"bytes": encoded}],
        encoded.rstrip("=")[:76] + "\n" + encoded.rstrip("=")[76:],  # wrapped, without padding
        [f"data:image/png;base64,{encoded}"],
    ]
    rows = usable([row(images=images) for images in forms], tmp_path)
    assert [list(map(is_red, example.images)) for example in rows] == [[True]] * len(forms)


def test_columns_of_images(tmp_path):
    """One image or a list; a question without a marker gets one per image in front."""
    (tmp_path / "a.png").write_bytes(plain())
    for column in "image Image IMAGES image_path imagePath img picture file_name".split():
        question = {"question": "?", "answer": 1}
        table = [question | {column: "a.png"}, question | {column: ["a.png", "a.png"]}]
        table += [{column: "b.png"} | row(), text(1) | {column: None}]
        one, two, known, none = usable(table, tmp_path)
        assert (one.question, two.question) == ("<image>?", "<image><image>?")
        assert all(map(is_red, [*one.images, *known.images, *two.images]))
        assert len(known.images) == 1  # `images` goes before other columns
        assert one.columns == {} and none.images == []


def test_an_image_that_is_not_read_refuses_its_row():
    for value in ("a.png", "https://host/a.JPG?size=1", {"bytes": plain()}, [{"path": "b.webp"}]):
        further = {"scan": 7, "file_name": "a.json"}
        rows = usable([text(0, scan=value), row(scan=value), text(2, **further)])
        assert rows.unusable == {"unread image": 1} and rows[1].columns == further


def test_transparent_images_are_put_on_white():
    for mode, color, options in [
        ("RGBA", (*RED, 0), {"form": "WEBP", "lossless": True, "exact": True}),
        ("LA", (77, 0), {}),
        ("P", 1, {"transparency": 1}),
        ("RGB", RED, {"transparency": RED}),
        ("L", 77, {"transparency": 77}),
    ]:
        image = Image.new(mode, (40, 30), color)
        if mode == "P":
            image.putpalette([0, 0, 0, *RED, *BLUE])
        assert read(image, **options).getpixel((9, 9)) == (255, 255, 255), mode
    assert read(Image.new("RGBA", (40, 30), (255, 0, 0, 102))).getpixel((9, 9)) == (255, 153, 153)
    assert is_red(read(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG"))


def test_deep_images_are_not_black():
    for stored, expected in [
        (np.uint16([0, 77 * 256, 65535]), [0, 77, 255]),
        (np.uint16([0, 2048, 4095]), [0, 128, 255]),  # 12 bits
        (np.int32([0, 1, 200_000]), [0, 0, 255]),
        (np.float32([0, 0.5, 1]), [0, 128, 255]),
        (np.float32([0, 0, 0]), [0, 0, 0]),
        (np.float32([0, 0.5, 200]), [0, 0, 200]),
        (np.float32([-1, 0, 1]), [0, 128, 255]),
        (np.float32([np.nan, np.inf, 1]), [0, 0, 255]),
    ]:
        image = read(Image.fromarray(stored[None]), "TIFF")
        assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


def test_exif_orientation_is_applied_and_broken_exif_ignored():
    image = Image.new("RGB", (40, 30), RED)
    image.paste(BLUE, (0, 0, 20, 30))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: blue on top
    upright = read(image, exif=exif)
    assert upright.size == (30, 40)
    assert upright.getpixel((15, 5))[2] > 200 and upright.getpixel((15, 35))[0] > 200
    assert read(image, "JPEG", exif=b"Exif\0\0rubbish").size == (40, 30)


# --------------------------------------------------------------------------------------------- rows


def test_answers_become_text():
    rows = usable([text(0, answer=answer) for answer in ["x", 3, 3.0, 2.5, True, 0]])
    assert answers(rows) == ["x", "3", "3", "2.5", "True", "0"]


def test_a_sharegpt_row_has_a_question_and_an_answer():
    """test_tables.py reads whole ones."""
    user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}
    wrong = [[user], [user, assistant] * 2, [assistant, user], [], "text"]
    with pytest.raises(ValueError, match="none of its 5 rows can be used: {'messages': 5}"):
        usable([{"messages": turns} for turns in wrong])


BROKEN = {
    "not a row": 7,
    "no text in question": {"question": " ", "answer": "1"},
    "no text in answer": {"problem": "?", "text": "?"},
    "no text in problem": {"problem": {"text": "?"}, "answer": "1"},
    "refused": {"problem": "?", "answer": "half of a surrogate pair: \ud83d"},
    "markers": row(problem="<image><image>?"),
    "images_aug": row(images_aug=[plain()] * 2),
    "broken image": row("https://host/nowhere.png"),
}


def test_broken_rows_are_skipped_and_the_first_of_each_kind_is_reported(capsys):
    table = [*BROKEN.values(), text(0), *BROKEN.values(), text(1)]
    rows = usable(table)
    assert rows.unusable == dict.fromkeys(BROKEN, 2)
    assert rows.numbers == [len(BROKEN), len(table) - 1]
    assert answers(rows) == ["0", "1"]
    lines = capsys.readouterr().err.splitlines()
    for number, (kind, line) in enumerate(zip(BROKEN, lines, strict=True)):
        assert line.startswith(f"mine: row {number} is skipped, {kind}: ")
    assert usable(table, limit=1).numbers == rows.numbers[:1]
    assert usable(table, limit=0).numbers == rows.numbers


def test_further_image_columns():
    """images_aug where there is one; those that are asked for, under both names, must be there for
    rows with images; others are not read."""
    red, blue = plain(), plain(color=BLUE)
    ours = row(red, images_pos=[red], images_neg=[blue], level=3)
    released = row(red, image_noisy=red, image_aug=blue)  # one image, not a list
    table = [ours, released, text(1), row(red, images_pos=[red]), row(red, image_aug=[blue, blue])]
    rows = usable(table, columns=("images_pos", "images_neg"))
    assert rows.numbers == [0, 1, 2] and rows.unusable == {"images_neg": 1, "images_pos": 1}
    for example in (rows[0], rows[1]):
        found = {name: is_red(images[0]) for name, images in example.more_images.items()}
        assert found == {"images_pos": True, "images_neg": False}
    assert rows[0].columns == {"level": 3} and rows[1].columns == {}
    assert all(usable(table)[i].more_images == {} for i in range(5))
    two, none = usable([row(red, images_aug=[blue]), text(3, images=[None], images_aug=[])])
    assert not is_red(two.more_images["images_aug"][0])
    assert none.images == [] and none.more_images == {}
    with pytest.raises(ValueError, match="toy has no image column 'depth': choose from images"):
        data.load("toy", columns=("depth",))


def test_overlong_prompts_are_found_from_headers():
    def length(question, sizes):
        if "spells" in question:
            raise ValueError("the question spells out an image token")
        return len(question) + sum(width * height // 784 for width, height in sizes)

    big = row(truncated((600, 400)), problem="<image>big?")  # 317 tokens
    table = [big, row(plain((28, 28)), problem="small?"), text(0), text(1) | {"problem": "spells"}]
    for limit, unusable in ((317, {"refused": 1}), (316, {"overlong": 1, "refused": 1})):
        assert usable(table, length=length, max_prompt_tokens=limit).unusable == unusable


def test_the_toy():
    assert len(data.load("toy")) == 4096
    assert list(data.load("toy", limit=2, seed=1)) == [toy.example("train", i, 1) for i in range(2)]
    assert list(map(len, data.eval_sets("toy").values())) == [256, 256]


def test_the_first_rank_checks_the_rows_for_all(monkeypatch):
    monkeypatch.setattr(data, "from_first_rank", lambda task: (2, ([1], 0)))
    assert usable([text(0), text(1)]).numbers == [1]
    with pytest.raises(ValueError, match="differs between machines: 1 rows here, 2 on the"):
        usable([text(0)])


def test_edited_data_is_noticed(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(plain())
    for edit in (
        lambda rows: rows[1].update(answer="7"),
        lambda rows: rows[0].update(images=["b.png"]),
        lambda rows: rows[0].update(scan=plain(color=BLUE)),
        lambda rows: rows[2].update(answer=""),
        lambda rows: rows.reverse(),
    ):
        rows = [row("a.png", scan=plain()), text(1), text(2)]
        keep_checksums(tmp_path, {"mine": usable(rows, tmp_path).checksum}, resuming=False)
        keep_checksums(tmp_path, {"mine": usable(rows, tmp_path).checksum}, resuming=True)
        edit(rows)
        with pytest.raises(OSError, match="data mine has changed since the run began: restore it"):
            keep_checksums(tmp_path, {"mine": usable(rows, tmp_path).checksum}, resuming=True)


def test_a_run_without_images_and_its_resumption_on_edited_data(run, tmp_path, capsys):
    """A warning where the objective needs an image; an error for the edit."""
    file = write_jsonl(tmp_path / "mine.jsonl", [text(i) for i in range(5)])
    flags = f"--data {file} --val_data none --steps 1 --algo papo_g"
    out = run("run", flags)
    assert f"warning: no row of {file} has an image" in capsys.readouterr().err
    file.write_text(file.read_text().replace('"4"', '"5"'))
    with pytest.raises(SystemExit):
        run("run", f"{flags} --resume {out}")
    assert "has changed since the run began" in capsys.readouterr().err


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


def test_epochs_are_fresh_permutations_and_a_position_resumes_exactly():
    rounds = take(rounds_of(texts(5), 8, seed=1), 5)  # longer than an epoch
    order = [answer for prompts in rounds for _, answer in prompts]
    epochs = [tuple(order[i : i + 5]) for i in range(0, 40, 5)]
    assert all(sorted(epoch) == list("01234") for epoch in epochs)
    assert len(set(epochs)) > 4
    for k in range(5):
        assert take(rounds_of(texts(5), 8, seed=1, position=8 * k), 5 - k) == rounds[k:]


def test_rows_that_turn_out_bad_are_left_out_and_counted(capsys):
    """`load` reads headers alone, so truncated pixels are found when a row is read."""
    table = [text(i) for i in range(8)]
    table[2], table[5] = row(truncated()), row(truncated(form="JPEG"))

    def encode(example, index):
        if example.answer == "7":
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return index, example.answer

    rows = usable([BROKEN["markers"], *table])
    capsys.readouterr()
    for prompts in take(rounds_of(rows, 8, encode), 2):
        assert sorted(answer for _, answer in prompts) == ["0", "1", "3", "4", "6"]
    usual = [data.shuffled(8, 0, 1).index(i) for i in (0, 1, 3, 4, 6)]
    assert sorted(index for index, _ in prompts) == sorted(usual)  # the others keep their index
    assert (rows.skipped, rows.unusable) == ({"broken image": 4, "refused": 2}, {"markers": 1})
    assert len(capsys.readouterr().err.splitlines()) == 2  # the first of each kind


def test_a_bug_in_encode_is_raised_and_endless_failure_ends():
    def refuse_most(example, index):
        if index:
            raise ValueError("no such size")
        return index

    with pytest.raises(ZeroDivisionError):
        next(rounds_of(texts(4), 2, lambda example, index: 1 / 0))
    assert take(rounds_of(texts(4), 20, refuse_most), 8) == [[0]] * 8  # 19 in a row are bad luck
    with pytest.raises(StepError, match="64 prompts in a row cannot be used: no such size"):
        next(rounds_of(texts(4), 100, refuse_most))
