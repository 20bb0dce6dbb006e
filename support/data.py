"""Rows -> examples, and the shuffled rounds of them that each rank reads.

The start of the pipeline. `load` returns the usable rows of a training set, `eval_sets` those of
evaluation sets; tables.py finds and reads their files. `shuffled_rounds` deals rows to the ranks,
and `encode_ahead` reads and encodes them in threads.

A row has `problem` (or `question`), `answer` and perhaps an image or a list of images, in a column
`images`, `image`, `image_path`, `img`, `file_name` or the like. An image is a path (relative to the
data file), bytes, base64, a data URL, {bytes, path} or a PIL image. Each `<image>` marker in the
question stands for one image; without any marker the images go in front. A sharegpt row has
`messages` instead: the question is the user's message, the answer the assistant's. Optional are
`id`, `images_aug` (images masked beforehand), and image columns that a variant asks for. Unusable
rows are skipped and counted, and the first of each kind is reported on stderr.

Differences from the released loader:
1. Broken, empty and mismatched rows are skipped; there they end the run or go unnoticed, as do
   images without markers, which here go in front of the question.
2. Prompts that are too long are found from image headers. Pixels are decoded when a row is read.
3. Images become RGB without losing transparency, depth or orientation (images.py), and only the
   image processor resizes them. (Those of further columns first get the size of their image.)
4. A round has the same prompts on any number of ranks: the order depends on seed and epoch alone.

    python -c "from support import data; rows = data.load('toy'); print(len(rows), rows[0])"
"""

from __future__ import annotations

import itertools
import random
import re
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from support import StepError, tables, toy
from support.batch import Example
from support.distributed import on_first_rank
from support.images import is_base64, looks_like_image, read_image
from support.tables import BadRowError, DataError, as_dict, one_line

ENCODERS = 4  # threads that decode and encode images
TOY_TRAIN_ROWS, TOY_EVAL_ROWS = 4096, 256
MAX_ASPECT_RATIO = 200  # Qwen's image processor refuses images beyond it
MAX_CONSECUTIVE_BAD_ROWS = 64  # while encoding; then something else is wrong

# Columns that images are read from. imagefolder's may name other files, too.
IMAGE_COLUMN = r"(image|img|picture|photo)s?([ _-]?(path|file|name|bytes|base64|data|url)s?)*"
FILE_COLUMN = r"file_?names?"
# Names of further image columns: ours, then the one in TAPO's released data.
COLUMN_NAMES = {
    "images_pos": ("images_pos", "image_noisy"),
    "images_neg": ("images_neg", "image_aug"),
}


def print_error(line: str) -> None:
    print(line, file=sys.stderr)


def attempt(task: Callable, where: str, skipped: Counter, report: Callable = print_error):
    """task(), or None if its row cannot be used: then it is counted by kind ("refused" by the
    encoder), and the first of each kind is reported."""
    try:
        return task()
    except ValueError as error:
        kind = getattr(error, "kind", "refused")
        skipped[kind] += 1
        if skipped[kind] == 1:
            report(one_line(f"{where} is skipped, {error}"))
        return None


# --------------------------------------------------------------------------------------------- rows


def parse_row(row, number: int, folder: Path = Path(), columns: tuple[str, ...] = ()) -> Example:
    """A row as an example, its images as they are stored. BadRowError if the row is unusable.

    folder: of relative image paths. columns: image columns that rows with images must have.
    """
    row = as_dict(row)
    names = ", ".join(row)
    if row.get("messages") is not None:
        row |= from_messages(row.pop("messages"))
    is_problem = row.get("problem") is not None or "question" not in row
    question_column = "problem" if is_problem else "question"
    missing = [column for column in (question_column, "answer") if column not in row]
    if missing:
        raise BadRowError("missing column", f"{', '.join(missing)}; the row has {names}")
    question = as_text(row.pop(question_column), "question")
    answer = as_text(row.pop("answer"), "answer")
    images = pop_images(row, image_columns(row), folder)
    more_images = {}
    for column in ("images_aug", *columns):
        column_names = COLUMN_NAMES.get(column, (column,))
        more = pop_images(row, column_names, folder)
        if images and not more and column in columns:
            raise BadRowError("missing column", f"{' or '.join(column_names)}; the row has {names}")
        if more and len(more) != len(images):
            raise BadRowError(column, f"{len(more)} images in {column} for {len(images)} images")
        if more:
            more_images[column] = more
    unread = [name for name in row if looks_like_image(row[name])]
    if unread and not images:
        choices = "choose images, image, image_path, img or the like"
        raise BadRowError("unread image", f"column {unread[0]!r} looks like an image: {choices}")
    question = place_markers(question, len(images))
    row_id = number if row.get("id") is None else row["id"]
    others = {name: row[name] for name in row if name not in unread}
    return Example(question, answer, images, str(row_id), more_images, others)


def image_columns(row: dict) -> list[str]:
    """The columns that images may be in, `images` first."""

    def may_hold_images(name: str) -> bool:
        is_file = re.fullmatch(FILE_COLUMN, name, re.IGNORECASE) and looks_like_image(row[name])
        return bool(is_file or re.fullmatch(IMAGE_COLUMN, name, re.IGNORECASE))

    return sorted(filter(may_hold_images, row), key=lambda name: name != "images")


def pop_images(row: dict, names: Iterable[str], folder: Path) -> list:
    """Take columns out of a row. Returns the images of the first that has any, as stored."""
    columns = [as_list(row.pop(name, None)) for name in names]
    images = next(filter(None, columns), [])
    return [stored(image, folder) for image in images]


def stored(image, folder: Path):
    """An image without {bytes, path} around it, as `read_image` takes it."""
    if isinstance(image, dict):
        kept = (image[key] for key in ("bytes", "path") if image.get(key) is not None)
        image = next(kept, image)
    if isinstance(image, str) and not is_base64(image):
        return folder.joinpath(image)
    return image


def place_markers(question: str, n_images: int) -> str:
    """The question with one marker per image: in front, where it has none."""
    markers = question.count("<image>")
    if markers not in (0, n_images):
        problem = f"{markers} <image> markers for {n_images} images: {question}"
        raise BadRowError("markers", problem)
    return question if markers else "<image>" * n_images + question


def from_messages(turns) -> dict:
    """`problem` and `answer` from the two turns of a sharegpt row."""
    turns = as_list(turns)
    roles = [isinstance(turn, dict) and turn.get("role") for turn in turns]
    if roles != ["user", "assistant"]:
        raise BadRowError("messages", f"expected the user's, then the assistant's: {turns}")
    user, assistant = turns
    return {"problem": user.get("content"), "answer": assistant.get("content")}


def as_list(value) -> list:
    """A column that should be a list, without its gaps. A single value is a list of one."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [value for value in values if not is_missing(value)]


def is_missing(value) -> bool:
    """None, NaN (pandas' missing value) or blank text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def as_text(value, name: str) -> str:
    """A question or an answer as text that is not empty. 3 and 3.0 are "3", true is "True"."""
    if isinstance(value, (list, dict, bytes)):
        raise BadRowError(f"{name} is not text", repr(value))
    if is_missing(value):
        raise BadRowError(f"empty {name}", repr(value))
    if isinstance(value, float) and value.is_integer():  # an integer column with gaps
        value = int(value)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as "\ud83d" in JSON
        raise BadRowError(f"{name} is not valid Unicode", repr(value)) from error
    return text


# ---------------------------------------------------------------------------------- the usable rows


@dataclass
class Rows:
    """The usable rows of a data set.

    rows[i] decodes the images of an example. BadRowError if their pixels turn out broken.
    """

    name: str
    get: Callable[[int], Example]  # by the row's number in the data set
    numbers: Sequence[int]  # of the usable rows, from 0
    with_image: int = 0  # how many have an image
    skipped: Counter = field(default_factory=Counter)  # kind -> rows left out by `load`
    checksums: dict[str, int] = field(default_factory=dict)  # by column; what tells edited data
    broken: Counter = field(default_factory=Counter)  # kind -> rows left out by `encode_ahead`

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Example:
        return self.get(self.numbers[i])

    def summary(self) -> str:
        images = f"{self.with_image} of {len(self)} rows have an image"
        return f"{self.name}: {images}; left out: {dict(self.skipped) or 'none'}"


def load(spec, split="train", *, seed=0, columns=(), **limits) -> Rows:
    """The usable rows of a training set. DataError if it cannot be read or no row is usable.

    `spec`: "toy" or "toy:grid=4,..." (see toy.setting_of; `seed` is the toy's), a file (one split,
    whatever `split` says), a folder of files, or a hub id. `columns`: image columns that rows with
    images must have. `limits`: limit, length and max_prompt_tokens of `check_rows`. The toy has a
    limit of its own, and its prompts are short and not measured. All ranks call it.
    """
    setting = toy.setting_of(spec)
    if not setting:
        [located] = tables.open_sets(str(spec), (split,)).values()
        return usable_rows(str(spec), located, columns, **limits)
    if split not in toy.SPLITS:
        choices = ", ".join(toy.SPLITS)
        raise DataError(f"the toy has no split {split!r}: choose one of {choices}")
    unknown = [column for column in columns if column not in toy.RELATIVES]
    if unknown:
        choices = ", ".join(toy.RELATIVES)
        raise DataError(f"the toy has no image column {unknown[0]!r}: choose from {choices}")
    n = limits.get("limit") or (TOY_TRAIN_ROWS if split == "train" else TOY_EVAL_ROWS)
    get = partial(toy.example, split, seed=seed, setting=setting, columns=columns)
    return Rows(f"toy/{split}", get, range(n), with_image=n)


def eval_sets(spec: str, *, seed=0, source: str = tables.HUB, **limits) -> dict[str, Rows]:
    """Set name -> its rows. DataError if a set cannot be read. All ranks call it.

    `spec` may be the toy; benchmarks (see `benchmark_names`), read from the folder or hub id
    `source`; a file; or a folder or hub id, of which the first of SPLITS is read. The tables of a
    folder are a set each if none is a split. `seed`, `limits`: see `load`.
    """
    setting = toy.setting_of(spec)
    if setting:
        splits = [setting.split] if setting.split else toy.EVAL_SPLITS
        return {split: load(spec, split, seed=seed, **limits) for split in splits}
    if names := tables.benchmark_names(spec):
        sets = tables.open_benchmarks(spec, names, source)
    else:
        sets = tables.open_sets(spec, tables.SPLITS, set_per_table=True)
    return {name: usable_rows(name, located, **limits) for name, located in sets.items()}


def usable_rows(name: str, located: list, columns: tuple[str, ...] = (), **limits) -> Rows:
    """The usable rows of a table of tables.py. The first rank checks them for all. See `load`."""

    def get(number: int) -> Example:
        rows, index, folder = located[number]
        example = parse_row(rows[index], number, folder, columns)
        more_images = {
            column: list(map(read_image, images)) for column, images in example.more_images.items()
        }
        images = list(map(read_image, example.images))
        return replace(example, images=images, more_images=more_images)

    total, fields = on_first_rank(lambda: check_rows(name, located, columns, **limits))
    if len(located) != total:
        problem = f"{len(located)} rows here, {total} on the first rank"
        raise DataError(f"data {name!r} differs between machines: {problem}")
    return Rows(name, get, *fields)


def check_rows(
    name: str, located: list, columns=(), *, limit=None, length=None, max_prompt_tokens=None
) -> tuple[int, tuple]:
    """(number of rows, fields of Rows after `get`), from headers. DataError if no row is usable.

    `limit`: stop after so many usable rows; None and 0: all. `length(question, [(width, height),
    ...])` is the number of prompt tokens; prompts longer than `max_prompt_tokens` are skipped.
    """
    numbers, with_image, skipped, lines, checksums = [], 0, Counter(), [], Counter()

    def check(number: int) -> tuple[dict, Example]:
        rows, index, folder = located[number]
        row = as_dict(rows[index])
        example = parse_row(row, number, folder, columns)
        check_sizes(example, length, max_prompt_tokens)
        return row, example

    for number in range(len(located)):
        if limit and len(numbers) >= limit:
            break
        checked = attempt(partial(check, number), f"{name}: row {number}", skipped, lines.append)
        if checked:
            row, example = checked
            numbers.append(number)
            with_image += bool(example.images)
            for column, value in row.items():
                content = repr(without_bytes(value)).encode(errors="replace")
                checksums[column] = zlib.crc32(content, checksums[column])
    if not numbers:
        counts = ", ".join(f"{kind} {count}" for kind, count in skipped.items())
        problem = f"data {name!r}: none of its {len(located)} rows can be used"
        raise DataError(f"{problem} ({counts}): {lines[0]}" if lines else f"{problem}: no rows")
    for line in lines:
        print_error(line)
    checksums = {"number of rows": len(numbers), **checksums}
    return len(located), (numbers, with_image, skipped, checksums)


def without_bytes(value):
    """A value with a checksum in the place of bytes, whose repr would take a while."""
    if isinstance(value, dict):
        return {key: without_bytes(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_bytes(each) for each in value]
    return zlib.crc32(value) if isinstance(value, bytes) else value


def check_sizes(example: Example, length: Callable | None, max_prompt_tokens: int | None) -> None:
    """BadRowError if an image is broken or too thin, or the prompt too long."""
    images = itertools.chain(example.images, *example.more_images.values())
    sizes = [read_image(source, read=lambda image: image.size) for source in images]
    for width, height in sizes:
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            limit = f"more than {MAX_ASPECT_RATIO} to 1"
            raise BadRowError("aspect ratio", f"an image of {width} x {height} pixels, {limit}")
    if max_prompt_tokens:
        tokens = length(example.question, sizes[: len(example.images)])
        if tokens > max_prompt_tokens:
            excess = f"{tokens} prompt tokens, more than {max_prompt_tokens}"
            raise BadRowError("overlong", f"{excess}: {example.question}")


# --------------------------------------------------------------------------------------- the rounds


@lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def shuffled_rounds(
    n: int, size: int, *, seed=0, position=0, rank=0, world=1
) -> Iterator[list[tuple[int, int]]]:
    """This rank's share of endless rounds of n shuffled rows: [(index in the round, row)].

    The permutations of all epochs are laid end to end. A round is the next `size` rows of that
    sequence, from `position` on, and this rank takes every world-th of them.
    """
    for start in itertools.count(position, size):
        share = []
        for index in range(rank, size, world):
            epoch, offset = divmod(start + index, n)
            share.append((index, shuffled(n, seed, epoch)[offset]))
        yield share


def encode_ahead(rows: Rows, encode: Callable, rounds: Iterable[list]) -> Iterator[list]:
    """The prompts of each round, encode(rows[i], index) for its (index, i).

    Threads encode the next round while the caller works: two rounds are in memory. Rows whose
    images turn out broken, or that `encode` refuses with a ValueError, are left out and counted in
    rows.broken; StepError after MAX_CONSECUTIVE_BAD_ROWS. close() drops what is queued.

    torch's DataLoader prefetches too, but a bad row ends it, and it cannot start within an epoch.
    """
    pool, n_bad = ThreadPoolExecutor(ENCODERS), 0

    def start(share: list) -> list[tuple]:
        return [(i, pool.submit(lambda i=i, k=k: encode(rows[i], k))) for k, i in share]

    def finish(started: list[tuple]) -> list:
        nonlocal n_bad
        prompts = []
        for i, future in started:
            where = f"{rows.name}: row {rows.numbers[i]}"
            prompt = attempt(future.result, where, rows.broken)
            n_bad = n_bad + 1 if prompt is None else 0
            if n_bad >= MAX_CONSECUTIVE_BAD_ROWS:
                kinds = ", ".join(rows.broken)
                raise StepError(f"{where}: {n_bad} prompts in a row cannot be used: {kinds}")
            if prompt is not None:
                prompts.append(prompt)
        return prompts

    ahead: deque = deque()
    try:
        for share in rounds:
            ahead.append(start(share))
            if len(ahead) == 2:
                yield finish(ahead.popleft())
        while ahead:
            yield finish(ahead.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
