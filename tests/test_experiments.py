"""The experiments' bookkeeping: what is run, what counts as misread, the statistics, tables from results alone."""

import json
from pathlib import Path

import pytest

from experiments import report, run
from support import toy

ROOT = Path(__file__).parent.parent

SETTING = toy.setting_of(run.SPEC)


def test_every_run_is_one_job_and_starts_come_first():
    jobs = run.jobs_of(list(run.EXPERIMENTS), None)
    assert len(jobs) == len(set(jobs)) and all(variant in run.VARIANTS for variant, _ in jobs)
    starts = [variant == "start" for variant, _ in jobs]
    assert starts == sorted(starts, reverse=True) and not {seed for _, seed in jobs} & {0, 1, 2}
    assert run.jobs_of(["gamma"], [11, 99]) == [(name, 11) for name in run.EXPERIMENTS["gamma"][0]]
    assert set(report.GAMMAS) == set(run.EXPERIMENTS["gamma"][0])
    assert set(report.LARGE) == set(run.EXPERIMENTS["regularisation"][0])


def test_every_variant_is_something_train_takes(tmp_path):
    import train

    for name, flags in run.VARIANTS.items():
        if name != "start":
            words = [
                f"--{k}" if v is True else f"--{k}={v}" for k, v in (run.TRAINING | flags).items()
            ]
            config, algo = train.settings(
                [*words, "--model", run.SPEC, "--out", str(tmp_path / name)]
            )
            train.dataclasses.replace(train.preset(config.algo), **algo)
            assert config.data == run.SPEC and config.max_new_tokens == 61


def test_a_reading_is_misread_where_its_count_is_off():
    cells, asked, note, _ = toy.layout("general", 3, setting=SETTING)
    true = toy.reading(cells, asked, setting=SETTING)
    assert run.read_cells(true, SETTING) == cells
    copied = toy.reading(cells, asked, box=note, setting=SETTING)  # a true reading, another box
    assert (
        not run.misread(copied, "general", 3, SETTING)
        and run.cells_right(copied, "general", 3, SETTING) == 1
    )
    other = next(c for c in toy.COLOURS if c != asked)
    swapped = [*cells]
    place = next(i for i, c in enumerate(cells) if c != asked)
    swapped[place] = asked
    assert run.misread(toy.reading(swapped, asked, setting=SETTING), "general", 3, SETTING)
    harmless = [*cells]
    harmless[place] = (
        other if cells[place] == "none" else "none"
    )  # wrong, but the count is the picture's
    wrong = toy.reading(harmless, asked, setting=SETTING)
    assert (
        not run.misread(wrong, "general", 3, SETTING)
        and run.cells_right(wrong, "general", 3, SETTING) == 15 / 16
    )
    assert run.misread("no reading at all", "general", 3, SETTING) == (cells.count(asked) > 0)


def test_sign_flip_is_exact():
    assert report.sign_flip([1.0] * 8) == 2 / 256
    assert report.sign_flip([1.0, -1.0]) == 1.0 and report.sign_flip([3.0, -1.0]) == 0.5 * 2


def result(variant, seed, accuracy):
    part = {
        "accuracy": accuracy,
        "responses": 100,
        "wrong": 40,
        "misread": 30,
        "cells_right": 0.9,
        "unboxed": 0.0,
    }
    found = {"variant": variant, "seed": seed, "commit": "x", "spec": run.SPEC, "evaluation": {}}
    found["final"] = {"general": part, "vision_dependent": part | {"accuracy": accuracy / 2}}
    if variant != "start":
        names = ("kl_prcp", "entropy", "masked_entropy", "clip_frac", "seconds")
        found["metrics"] = {name: [0.1, 0.2 + seed / 100] for name in names}
        values = {"0": (0.1, 0.1), "2": (0.5, 0.3)}
        found["curve"] = {
            at: {"general": a, "vision_dependent": b} for at, (a, b) in values.items()
        }
    return found


def test_the_report_is_drawn_from_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    for seed in (10, 11):
        for variant, accuracy in {
            "start": 0.2,
            "grpo": 0.5,
            "papo_g": 0.6,
            "gamma_0.1": 0.4,
            "mask_1.0": 0.5,
        }.items():
            file = tmp_path / "results" / f"{variant}-s{seed}.json"
            file.write_text(json.dumps(result(variant, seed, accuracy + seed / 1000)))
    report.main()
    text = (tmp_path / "report.md").read_text()
    assert (
        "| papo_g | 2 | 61.0 +- 0.6 | 30.5 +- 0.3 | 45.8 +- 0.5 | 40.0 +- 0.0 | +19.6 +- " in text
    )
    assert "| gamma 0.1 | 2 | 41.0" in text and "-7.5 +- 0.0 |" in text and "(not run yet)" in text
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {
        "table1.png",
        "gamma.png",
        "masking.png",
        "no_kl_ref.png",
    }  # of what has two variants
    found = report.load()
    assert report.delta_rel(found["papo_g"][10], found["grpo"][10]) == pytest.approx(
        100 * (0.61 / 0.51 - 1)
    )


def test_the_readme_quotes_the_results():
    """Its Table 1 is report.py's, from the committed results; PAPO is ahead at every seed, as it says."""
    found, readme = report.load(), (ROOT / "README.md").read_text()
    for variant in ("grpo", "papo_g", "dapo", "papo_d"):
        assert sorted(found[variant]) == list(run.MANY)
        runs = found[variant].values()
        cells = [report.pm([report.score(each, split) for each in runs]) for split in report.SPLITS]
        assert f"| `{variant}` | {cells[0]} | {cells[1]} |" in readme
    for variant, base in (("papo_g", "grpo"), ("papo_d", "dapo")):
        gains = report.paired(found, variant, base, lambda a, b: report.score(a) - report.score(b))
        assert min(gains) > 0 and report.sign_flip(gains) == 2 / 256
        assert (
            report.pm(report.paired(found, variant, base, report.delta_rel), sign=True) + " %"
            in readme
        )
