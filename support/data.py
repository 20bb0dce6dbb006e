"""Rows -> examples, and the shuffled rounds of them that each rank reads.

A row (tables.py reads the files) has `problem` or `question`, `answer`, and perhaps an image or a
list of images (images.py says in which forms) in a column `images`, `image`, `image_path`, `img`,
`file_name` or the like. Each `<image>` marker in the question stands for one image; without any
marker the images go in front. A sharegpt row has question and answer in `messages`, the user's and
the assistant's. Optional are `id`, `images_aug` (images masked beforehand), and image columns that
a variant asks for.

Differences from the released loader:
1. Broken, empty and mismatched rows are skipped and counted; there they end the run or go
   unnoticed, as do images without markers, which here go in front of the question.
2. Prompts that are too long are found from image headers. Pixels are decoded when a row is read.
3. Only the image processor resizes images (those of further columns to the size of their image).
4. A round has the same prompts on any number of ranks: the order depends on seed and epoch alone.

    python -c "from support import data; rows = data.load('toy'); print(len(rows), rows[0])"
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial

from support import StepError, tables, toy
from support.batch import Example
from support.distributed import from_first_rank
from support.images import looks_like_image, read_image
from support.tables import BadRowError

ENCODERS = 4  # threads that decode and encode images
TOY_TRAIN_ROWS, TOY_EVAL_ROWS = 4096, 256

MAX_CONSECUTIVE_BAD_ROWS = 64  # while encoding; then something else is wrong

# Columns that images are read from.
IMAGE_COLUMN = r"(image|img|picture|photo)s?([ _-]?(path|file|name|bytes|base64|data|url)s?)*"
# Names of further image columns: ours, then the one in TAPO's released data.
COLUMN_NAMES = {
    "images_pos": ("images_pos", "image_noisy"),
    "images_neg": ("images_neg", "image_aug"),
}


# --------------------------------------------------------------------------------------------- rows


def parse_row(row: dict, number: int, columns: Sequence[str], read: Callable) -> Example:
    """A row as an example, which holds read(stored image) for each image.

    columns: image columns that rows with images must have. BadRowError if the row is unusable.
    """
    if not isinstance(row, dict):
        raise BadRowError("not a row", repr(row))
    row = row | from_messages(row.get("messages"))
    row.pop("messages", None)
    question = pop_text(row, "question" if row.get("problem") is None else "problem")
    answer = pop_text(row, "answer")
    images = pop_images(row, image_columns(row))
    more_images = {}
    for column in ("images_aug", *columns):
        names = COLUMN_NAMES.get(column, (column,))
        more = pop_images(row, names)
        if len(more) != len(images) and (more or column in columns):
            problem = f"{len(more)} images in {' or '.join(names)} for {len(images)} images"
            raise BadRowError(column, problem)
        if more:
            more_images[column] = [read(image) for image in more]
    unread = [name for name in row if looks_like_image(row[name])]
    if unread and not images:
        problem = f"column {unread[0]!r} looks like an image: call it images, image or the like"
        raise BadRowError("unread image", problem)
    markers = question.count("<image>")
    if markers not in (0, len(images)):
        problem = f"{markers} <image> markers for {len(images)} images: {question}"
        raise BadRowError("markers", problem)
    if not markers:
        question = "<image>" * len(images) + question
    row_id = number if row.get("id") is None else row["id"]
    images = [read(image) for image in images]
    return Example(question, answer, images, str(row_id), more_images, row)


def from_messages(turns) -> dict:
    """`problem` and `answer` of a sharegpt row; {} without turns."""
    match turns:
        case None:
            return {}
        case [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]:
            return {"problem": problem, "answer": answer}
    raise BadRowError("messages", f"expected the user's, then the assistant's: {turns}")


def image_columns(row: dict) -> list[str]:
    """The columns that images may be in, `images` first. imagefolder's may name other files too."""
    names = [name for name in row if re.fullmatch(IMAGE_COLUMN, name, re.IGNORECASE)]
    files = [name for name in row if re.fullmatch("file_?names?", name, re.IGNORECASE)]
    return ["images", *names, *(name for name in files if looks_like_image(row[name]))]


def pop_images(row: dict, names: Iterable[str]) -> list:
    """Take columns out of a row. Returns the images of the first that has any, as stored."""
    columns = [as_list(row.pop(name, None)) for name in names]
    return next(filter(None, columns), [])


def pop_text(row: dict, column: str) -> str:
    """Take a question or an answer out of a row, as text. 3 and 3.0 are "3", true is "True"."""
    value = row.pop(column, None)
    if is_missing(value) or isinstance(value, (list, dict, bytes)):
        raise BadRowError(f"no text in {column}", f"{value!r}; the row has {', '.join(row)}")
    if isinstance(value, float) and value.is_integer():  # an integer column with gaps
        value = int(value)
    text = str(value)
    text.encode()  # a ValueError at half of a surrogate pair, as "\ud83d" in JSON
    return text


def as_list(value) -> list:
    """A column that should be a list, without its gaps. A single value is a list of one."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [value for value in values if not is_missing(value)]


def is_missing(value) -> bool:
    """None, NaN (pandas' missing value) or blank text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


# ---------------------------------------------------------------------------------- the usable rows


@dataclass
class Rows:
    """The usable rows of a data set. rows[i] decodes images; BadRowError if pixels are broken."""

    name: str
    get: Callable[[int], Example]  # by the row's number in the data set
    numbers: Sequence[int]  # of the usable rows, from 0
    with_image: int = 0  # how many have an image
    unusable: Counter = field(default_factory=Counter)  # kind -> rows left out by `load`
    checksum: int = 0  # of the usable rows as they are stored
    skipped: Counter = field(default_factory=Counter)  # kind -> rows left out by `encode_ahead`

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Example:
        return self.get(self.numbers[i])

    def summary(self) -> str:
        images = f"{self.with_image} of {len(self)} rows have an image"
        return f"{self.name}: {images}; left out: {dict(self.unusable) or 'none'}"


def load(spec, *, seed=0, columns=(), **limits) -> Rows:
    """The usable rows of a training set. ValueError if it cannot be read or no row is usable.

    `spec`: "toy" or "toy:grid=4,..." (see toy.setting_of; `seed` is the toy's), a file, a folder of
    files, or a hub id. `columns`: image columns that rows with images must have. `limits`: limit,
    length and max_prompt_tokens of `check_rows`. All ranks call it.
    """
    if setting := toy.setting_of(spec):
        return toy_rows("train", setting, seed, columns, **limits)
    [located] = tables.open_sets(str(spec), training=True).values()
    return usable_rows(str(spec), located, columns, **limits)


def eval_sets(spec: str, *, seed=0, source: str = tables.HUB, **limits) -> dict[str, Rows]:
    """Set name -> its rows. ValueError if a set cannot be read. All ranks call it.

    `spec` may be the toy; benchmarks (see `benchmark_names`), read from the folder or hub id
    `source`; or a file, a folder or a hub id. `seed`, `limits`: see `load`.
    """
    if setting := toy.setting_of(spec):
        splits = [setting.split] if setting.split else toy.EVAL_SPLITS
        return {split: toy_rows(split, setting, seed, **limits) for split in splits}
    if names := tables.benchmark_names(spec):
        sets = tables.open_benchmarks(spec, names, source)
    else:
        sets = tables.open_sets(spec)
    return {name: usable_rows(name, located, **limits) for name, located in sets.items()}


def toy_rows(split: str, setting: toy.Setting, seed: int, columns=(), limit=0, **_) -> Rows:
    """Rows of the toy, whose prompts are short and not measured."""
    for column in columns:
        if column not in toy.RELATIVES:
            choices = ", ".join(toy.RELATIVES)
            raise ValueError(f"the toy has no image column {column!r}: choose from {choices}")
    n = limit or (TOY_TRAIN_ROWS if split == "train" else TOY_EVAL_ROWS)
    get = partial(toy.example, split, seed=seed, setting=setting, columns=columns)
    return Rows(f"toy/{split}", get, range(n), with_image=n)


def usable_rows(name: str, located: list, columns: Sequence[str] = (), **limits) -> Rows:
    """The usable rows of a table of tables.py. The first rank checks them for all. See `load`."""

    def get(number: int) -> Example:
        rows, index, folder = located[number]
        return parse_row(rows[index], number, columns, partial(read_image, folder=folder))

    total, fields = from_first_rank(lambda: check_rows(name, located, columns, **limits))
    if len(located) != total:
        problem = f"{len(located)} rows here, {total} on the first rank"
        raise ValueError(f"data {name!r} differs between machines: {problem}")
    return Rows(name, get, *fields)


def check_rows(
    name: str, located: list, columns=(), *, limit=0, length=None, max_prompt_tokens=0
) -> tuple[int, tuple]:
    """(number of rows, fields of Rows after `get`), from headers. ValueError if no row is usable.

    limit: stop after so many usable rows; 0: all. length(question, [(width, height), ...]): the
    number of prompt tokens.
    """
    numbers, with_image, unusable, checksum = [], 0, Counter(), 0
    for number, (rows, index, folder) in enumerate(located):
        if limit and len(numbers) >= limit:
            break
        try:
            row = rows[index]
            size_of = partial(read_image, folder=folder, read=lambda opened: opened.size)
            example = parse_row(row, number, columns, size_of)
            tokens = length(example.question, example.images) if max_prompt_tokens else 0
            if tokens > max_prompt_tokens:
                excess = f"{tokens} prompt tokens, more than {max_prompt_tokens}"
                raise BadRowError("overlong", f"{excess}: {example.question}")
        except ValueError as error:
            count(unusable, error, f"{name}: row {number}")
            continue
        numbers.append(number)
        with_image += bool(example.images)
        checksum = zlib.crc32(json.dumps(row, default=crc_or_repr).encode(), checksum)
    if not numbers:
        reasons = dict(unusable) or "no rows"
        raise ValueError(f"data {name!r}: none of its {len(located)} rows can be used: {reasons}")
    return len(located), (numbers, with_image, unusable, checksum)


def crc_or_repr(value) -> int | str:
    """What stands for a value that JSON cannot hold, such as an image's bytes."""
    return zlib.crc32(value) if isinstance(value, bytes) else repr(value)


def count(kinds: Counter, error: ValueError, where: str) -> None:
    """Count a row that cannot be used, by kind ("refused" by the encoder). Reports the first."""
    if not isinstance(error, BadRowError):
        error = BadRowError("refused", str(error))
    kinds[error.kind] += 1
    if kinds[error.kind] == 1:
        print(f"{where} is skipped, {error}", file=sys.stderr)


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
    rows.skipped; StepError after MAX_CONSECUTIVE_BAD_ROWS. close() drops what is queued.

    torch's DataLoader prefetches too, but a bad row ends it, and it cannot start within an epoch.
    """
    pool, n_bad = ThreadPoolExecutor(ENCODERS), 0

    def start(share: list) -> list[tuple]:
        return [(i, pool.submit(lambda i=i, k=k: encode(rows[i], k))) for k, i in share]

    def finish(started: list[tuple]) -> list:
        nonlocal n_bad
        prompts = []
        for i, future in started:
            try:
                prompts.append(future.result())
                n_bad = 0
            except ValueError as error:
                n_bad += 1
                where = f"{rows.name}: row {rows.numbers[i]}"
                count(rows.skipped, error, where)
                if n_bad == MAX_CONSECUTIVE_BAD_ROWS:
                    problem = f"{where}: {n_bad} prompts in a row cannot be used: {error}"
                    raise StepError(problem) from error
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
