"""The paper's nine evaluation sets."""

from __future__ import annotations

import itertools
import re
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

from support import toy
from support.data import SPLITS, SUFFIXES, DataError, Rows, find, load, read_files, select

# The paper's benchmarks, as PAPO-Eval's data set names its splits, and how else their files are called.
GENERAL = ("hiyouga_geometry3k", "AI4Math_MathVista", "We_Math", "PAPO_MMK12", "AI4Math_MathVerse")


VISION = (
    "lscpku_LogicVista",
    "BUAADreamer_clevr_count_70k",
    "MMMU_MMMU_Pro",
    "AI4Math_MathVerse_vision_dependent",
)


BENCHMARKS = {"all": GENERAL + VISION, "general": GENERAL, "vision_dependent": VISION}


ALIASES = {"We-Math_We-Math": "We_Math", "PAPO_MMK12_test": "PAPO_MMK12",
           "AI4Math_MathVerse-vision-dependent": "AI4Math_MathVerse_vision_dependent"}  # fmt: skip


HUB = "PAPO-Galaxy/PAPO_eval"


PLACES = (
    "",
    "data",
    "papo",
    "images",
)  # where in a folder of benchmarks tables, zips and pictures are


def eval_sets(
    spec, split="test", *, seed=0, limit=None, length=None, max_prompt_tokens=None, place=HUB
) -> dict[str, Rows]:  # fmt: skip
    """Name -> Rows: the toy's two sets; benchmarks (see `benchmark_names`) of the hub id or folder `place`; the `split`
    of a hub id or folder, else the first of SPLITS it has; a file, or each file of a folder where none is named after a
    split. The rest as in `load`."""
    if toy.setting_of(spec):
        return {
            name: load(spec, name, seed=seed, limit=limit)
            for name in ("general", "vision_dependent")
        }
    if names := benchmark_names(spec):
        place = spec if spec not in BENCHMARKS and Path(spec).expanduser().is_dir() else place
        return benchmarks(names, place, limit, length, max_prompt_tokens)
    found = find(spec, (split, *SPLITS), apart=True)
    return {
        name: select(name, *place, limit, length, max_prompt_tokens)
        for name, place in found.items()
    }


class Pictures:
    """folder / path for the image paths of a benchmark: a file beside its table, or in its zip.

    Zips are read in place: nothing is unpacked, so nothing can land outside a folder or be left half done. The first
    folder of a path need not be called as in the zip, and a leading "images/" (PAPO-Eval unpacks there) may be missing.
    """

    def __init__(self, folders: list[Path], zips: list[Path]):
        self.folders, self.members = (
            folders,
            {},
        )  # path in a zip, whole or without its first folder -> (zip, name)
        for archive in map(zipfile.ZipFile, zips):
            files = [info.filename for info in archive.infolist() if not info.is_dir()]
            parts = [PurePosixPath(name.replace("\\", "/")).parts for name in files]
            for skip in (0, 1):
                keys = Counter(
                    p[skip:] for p in parts
                )  # without its first folder a path may be that of two pictures
                found = {
                    p[skip:]: (archive, f)
                    for p, f in zip(parts, files, strict=True)
                    if keys[p[skip:]] == 1
                }
                self.members = found | self.members

    def __truediv__(self, path: str):
        for file in (folder / path for folder in self.folders):
            if file.is_file():
                return file
        parts = PurePosixPath(path).parts
        parts = parts[parts[:1] == ("images",) :]
        found = self.members.get(parts) or self.members.get(parts[1:])
        if not found:
            raise FileNotFoundError("no such picture beside the table or in its zip")
        return found[0].open(found[1])


def stems(name: str) -> list[str]:
    return [name, *(alias for alias, of in ALIASES.items() if of == name)]


def tables(name: str, places: list[Path]) -> list[Path]:
    """The table of a benchmark, in the first of `places` that has one: JSON before parquet, whose parts are several."""
    for place, kind in itertools.product(places, sorted(SUFFIXES)):
        files = sorted(place.glob(f"*{kind}"))
        if found := [
            file for file in files if re.sub(r"-\d+-of-\d+$", "", file.stem) in stems(name)
        ]:
            return found
    return []


def benchmark_names(spec: str) -> tuple[str, ...]:
    """The benchmarks meant: by all, general, vision_dependent, one's name, or a folder that holds some; else ()."""
    if spec in BENCHMARKS or ALIASES.get(spec, spec) in BENCHMARKS["all"]:
        return BENCHMARKS.get(spec) or (ALIASES.get(spec, spec),)
    places = [Path(spec).expanduser() / name for name in PLACES]
    return tuple(name for name in BENCHMARKS["all"] if tables(name, places))


def benchmarks(names, place, limit=None, length=None, max_prompt_tokens=None) -> dict[str, Rows]:
    """Name -> Rows of benchmarks. DataError, in one line, where one is missing. The rest as in `load`.

    `place`: a folder with NAME.json, .jsonl or .parquet (there, in data/ or in papo/) and the pictures, or
    NAME_images.zip; or a hub id of that shape, fetched into the hub's cache, which goes on where a download broke off.
    """
    folder = Path(place).expanduser()
    places, found = [folder / name for name in PLACES], {}
    if not folder.is_dir():
        folder = fetch(place, [stem for name in names for stem in stems(name)])
        places = sorted({file.parent for file in folder.rglob("*")})
    for name in names:
        if not (files := tables(name, places)):
            raise DataError(
                f"no benchmark {name} in {place}: its {name}.json is expected there, in data/ or in papo/"
            )
        zips = [p / f"{stem}_images.zip" for p in places for stem in stems(name)]
        try:
            pictures = Pictures(
                [files[0].parent, *places], [file for file in zips if file.is_file()]
            )
            table = read_files(files)
        except Exception as error:  # zipfile's, json's, pyarrow's
            raise DataError(
                f"benchmark {name} in {place} cannot be read: {type(error).__name__}: {error}"
            ) from error
        found[name] = select(name, table, pictures, limit, length, max_prompt_tokens)
    return found


def fetch(repo: str, stems: list[str]) -> Path:
    """The hub data set's snapshot folder, holding the files named after `stems`."""
    from huggingface_hub import snapshot_download

    patterns = [f"*{stem}{end}" for stem in stems for end in (*SUFFIXES, "-*-of-*", "_images.zip")]
    try:
        return Path(
            snapshot_download(repo, repo_type="dataset", allow_patterns=patterns, etag_timeout=20)
        )
    except Exception as error:  # the hub client's, whose classes differ by version
        message = f"benchmarks {repo!r} is no folder here, and cannot be had from the hub"
        raise DataError(f"{message}: {type(error).__name__}: {error}") from error
