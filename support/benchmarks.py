"""The sets that evaluation reads: the paper's nine benchmarks, the toy's two, or the user's own.

A benchmark is a table of sharegpt rows, NAME.json, and the images it names, beside it or in
NAME_images.zip. All nine are in one data set on the hub, which PAPO-Eval reads too.

    python -c "from support.benchmarks import eval_sets; print(eval_sets('toy')['general'][0])"
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import IO

from support import toy
from support.data import (
    SPLITS,
    SUFFIXES,
    DataError,
    Rows,
    load,
    open_tables,
    read_files,
    usable_rows,
)

HUB = "PAPO-Galaxy/PAPO_eval"
GENERAL = ("hiyouga_geometry3k", "AI4Math_MathVista", "We_Math", "PAPO_MMK12", "AI4Math_MathVerse")
VISION = (
    "lscpku_LogicVista",
    "BUAADreamer_clevr_count_70k",
    "MMMU_MMMU_Pro",
    "AI4Math_MathVerse_vision_dependent",
)
BENCHMARKS = {"all": GENERAL + VISION, "general": GENERAL, "vision_dependent": VISION}
ALIASES = {  # what their files may be called instead
    "We-Math_We-Math": "We_Math",
    "PAPO_MMK12_test": "PAPO_MMK12",
    "AI4Math_MathVerse-vision-dependent": "AI4Math_MathVerse_vision_dependent",
}

# Where a folder of benchmarks may keep tables, zips and images. papo/ and images/ are PAPO-Eval's.
SUBFOLDERS = ("", "data", "papo", "images")


def eval_sets(spec: str, *, seed: int = 0, source: str = HUB, **limits) -> dict[str, Rows]:
    """Set name -> its rows. DataError if a set cannot be read.

    `spec` may be the toy; benchmarks (see `benchmark_names`), read from the folder or hub id
    `source`; a file; or a folder or hub id, of which the first of SPLITS is read. The files of a
    folder are a set each if none is named after a split. `limits` are the arguments limit, length
    and max_prompt_tokens of data.load.
    """
    if toy.setting_of(spec):
        splits = ("general", "vision_dependent")
        return {split: load(spec, split, seed=seed, **limits) for split in splits}
    names = benchmark_names(spec)
    if names:
        is_folder = spec not in BENCHMARKS and Path(spec).expanduser().is_dir()
        return load_benchmarks(names, spec if is_folder else source, **limits)
    tables = open_tables(spec, SPLITS, set_per_file=True)
    return {
        name: usable_rows(name, table, folder, **limits) for name, (table, folder) in tables.items()
    }


def benchmark_names(spec: str) -> tuple[str, ...]:
    """The benchmarks meant by "all", a group's or a benchmark's name, or those a folder holds."""
    if spec in BENCHMARKS:
        return BENCHMARKS[spec]
    name = ALIASES.get(spec, spec)
    if name in BENCHMARKS["all"]:
        return (name,)
    folders = [Path(spec).expanduser() / subfolder for subfolder in SUBFOLDERS]
    return tuple(name for name in BENCHMARKS["all"] if table_files(name, folders))


def load_benchmarks(names: tuple[str, ...], source: str, **limits) -> dict[str, Rows]:
    """Benchmark -> its rows, from a folder or a hub id. DataError if one is missing or broken."""
    root = Path(source).expanduser()
    folders = [root / subfolder for subfolder in SUBFOLDERS]
    if not root.is_dir():
        root = download(source, names)
        folders = sorted({path.parent for path in root.rglob("*")})
    return {name: load_benchmark(name, source, folders, **limits) for name in names}


def load_benchmark(name: str, source: str, folders: list[Path], **limits) -> Rows:
    tables = table_files(name, folders)
    if not tables:
        expected = f"its {name}.json is expected there, in data/ or in papo/"
        raise DataError(f"no benchmark {name} in {source}: {expected}")
    candidates = [folder / f"{stem}_images.zip" for folder in folders for stem in file_stems(name)]
    zips = [path for path in candidates if path.is_file()]
    try:
        images = ImageFiles([tables[0].parent, *folders], zips)
        table = read_files(tables)
    except Exception as error:  # zipfile, json and pyarrow have classes of their own
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"benchmark {name} in {source} cannot be read: {problem}") from error
    return usable_rows(name, table, images, **limits)


def table_files(name: str, folders: list[Path]) -> list[Path]:
    """A benchmark's table in the first folder that has it: JSON, or parquet, perhaps in parts."""
    for folder in folders:
        for suffix in sorted(SUFFIXES):
            files = sorted(folder.glob(f"*{suffix}"))
            tables = [file for file in files if without_part(file.stem) in file_stems(name)]
            if tables:
                return tables
    return []


def without_part(stem: str) -> str:
    return re.sub(r"-\d+-of-\d+$", "", stem)


def file_stems(name: str) -> list[str]:
    """The names that a benchmark's files may have."""
    return [name, *(alias for alias, benchmark in ALIASES.items() if benchmark == name)]


def download(repo: str, names: tuple[str, ...]) -> Path:
    """The folder of the hub data set in the hub's cache, with the benchmarks' files."""
    from huggingface_hub import snapshot_download

    endings = (*SUFFIXES, "-*-of-*", "_images.zip")
    stems = [stem for name in names for stem in file_stems(name)]
    patterns = [f"*{stem}{ending}" for stem in stems for ending in endings]
    options = {"repo_type": "dataset", "allow_patterns": patterns, "etag_timeout": 20}
    try:
        return Path(snapshot_download(repo, **options))
    except Exception as error:  # the hub client's classes differ by version
        problem = "is not a folder here, and cannot be loaded from the hub"
        raise DataError(
            f"benchmarks {repo!r} {problem}: {type(error).__name__}: {error}"
        ) from error


class ImageFiles:
    """Stands in for the folder that a benchmark's image paths are relative to.

    Images are looked for in folders, then in zips, which are read in place: nothing is unpacked, so
    nothing can land outside a folder or be left incomplete. A path may begin with "images/", where
    PAPO-Eval unpacks, and its first folder need not have the zip's name for it.
    """

    def __init__(self, folders: list[Path], zips: list[Path]):
        self.folders = folders
        self.members: dict[tuple[str, ...], tuple[zipfile.ZipFile, str]] = {}  # path -> member
        for path in zips:
            archive = zipfile.ZipFile(path)
            self._add(archive, skip=0)
            self._add(archive, skip=1)

    def _add(self, archive: zipfile.ZipFile, skip: int) -> None:
        """Index an archive's files by path, without the first `skip` folders."""
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        paths = [PurePosixPath(name.replace("\\", "/")).parts[skip:] for name in names]
        count = Counter(paths)
        for path, name in zip(paths, names, strict=True):
            is_ambiguous = count[path] > 1  # two images share the path, and neither is meant
            if path and not is_ambiguous:  # the path is empty if there was no folder to skip
                self.members.setdefault(path, (archive, name))

    def joinpath(self, path: str) -> Path | IO[bytes]:
        """A file, or a member opened in its zip. FileNotFoundError if there is neither."""
        for folder in self.folders:
            if (folder / path).is_file():
                return folder / path
        parts = PurePosixPath(path).parts
        if parts[:1] == ("images",):
            parts = parts[1:]
        for key in (parts, parts[1:]):
            if key in self.members:
                archive, name = self.members[key]
                return archive.open(name)
        raise FileNotFoundError("no such image beside the table or in its zip")
