"""The study's tables and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenkeel.audit.plan import age_label
from evenkeel.files import write_atomically
from evenkeel.memory import CODES
from evenkeel.studies.frame import Facts, markdown, svg

PUBLISHED = {"5-way 1-shot": 97.44, "20-way 5-shot": 97.79, "100-way 5-shot": 93.97}
"""Percent, in full precision, as reimplementations quote the supplement of Karunaratne et al."""
HEAD = """# The memory on a crossbar: figures

Written by `evenkeel study hd_memory`. Percent, mean over episodes and its 95 % interval."""
SHOWN = (1, 2, 5, 10, 20, 50, 100, 200)


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """Tables; accuracy against the conductance spread; old and new classes."""
    sections = [HEAD]
    files = [folder / "tables.md"]
    if "software" in done:
        sections.append(f"## software\n\n{_software(done['software'])}")
    if "crossbar" in done:
        sections.append(f"## crossbar\n\n{_crossbar(done['crossbar'])}")
    if "spread" in done:
        sections.append(f"## spread\n\n{_spread(done['spread'])}")
        files.append(folder / "spread.svg")
        write_atomically(files[-1], svg(_spread_chart(done["spread"])).encode())
    if "continual" in done:
        sections.append(f"## continual\n\n{_continual(done['continual']['runs'])}")
        files.append(folder / "continual.svg")
        write_atomically(files[-1], svg(_continual_chart(done["continual"]["runs"])).encode())
    write_atomically(files[0], ("\n\n".join(sections) + "\n").encode())
    return files


def _said(row: Facts) -> str:
    return f"{row['accuracy']:.2f} ± {row['half_width']:.2f}"


def _software(figures: Facts) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in figures["sum"]))
    kinds = {
        "sum": "attention, summed",
        "nearest": "attention, nearest support",
        "one_key_a_class": "one key a class",
        "prototypes": "prototypical network",
    }
    found = {
        (kind, row["code"], row["task"]): _said(row) for kind in kinds for row in figures[kind]
    }
    rows = [
        [
            kinds[kind],
            "" if code == "prototypes" else code,
            *(found.get((kind, code, task), "") for task in tasks),
        ]
        for kind, code in dict.fromkeys((kind, code) for kind, code, _ in found)
    ]
    published = [f"{PUBLISHED[task]:.2f}" if task in PUBLISHED else "" for task in tasks]
    rows.append(["published, another cut", "real", *published])
    return markdown(["read-out", "code", *tasks], rows)


def _crossbar(figures: Facts) -> str:
    (task,) = {row["task"] for row in figures["software"]}
    ages = list(dict.fromkeys(row["age_s"] for row in figures["compensated"]))
    rows = []
    for code in CODES:
        (digital,) = (_said(row) for row in figures["software"] if row["code"] == code)
        for kind, said in (("compensated", "yes"), ("as_read", "no")):
            aged = [_said(row) for row in figures[kind] if row["code"] == code]
            rows.append([code, said, digital, *aged])
    heads = ["code", "fading compensated", "software", *(age_label(age) for age in ages)]
    return f"{task}, PCM.\n\n{markdown(heads, rows)}"


def _series(figures: Facts) -> list[tuple[str, list[Facts]]]:
    """Name and rows, one for each level, of every curve."""
    series = [
        (f"{objective}: {code}", [row for row in figures[objective] if row["code"] == code])
        for objective in ("softabs", "softmax")
        for code in CODES
    ]
    return series + [
        (f"softmax: bipolar, read by {sharpening}", rows)
        for sharpening, rows in figures["softmax_otherwise"].items()
    ]


def _spread(figures: Facts) -> str:
    levels = [f"{100 * level:.0f} %" for level in figures["levels"]]
    rows = [[name, *(_said(row) for row in of_levels)] for name, of_levels in _series(figures)]
    (task,) = {row["task"] for row in figures["softabs"]}
    return f"{task}.\n\n{markdown(['controller: code', *levels], rows)}"


def _spread_chart(figures: Facts) -> Any:
    import altair as alt

    points = [
        {
            "controller": f"trained with {name.split(': ')[0]}",
            "code": name.split(": ")[1],
            "spread": 100 * level,
            "accuracy": row["accuracy"],
        }
        for name, rows in _series(figures)
        for level, row in zip(figures["levels"], rows, strict=True)
        if "read by" not in name
    ]
    lines: Any = alt.Chart(alt.Data(values=points), width=300, height=220).mark_line(point=True)
    return lines.encode(
        x=alt.X("spread:Q", title="conductance spread, % of target"),
        y=alt.Y("accuracy:Q", title="accuracy, %"),
        color=alt.Color("code:N", title="code", sort=list(CODES)),
        column=alt.Column("controller:N", title=None),
    )


def _where(run: Facts) -> str:
    return f"{run['code']}, {'software' if run['device'] is None else 'PCM'}"


def _continual(runs: Sequence[Facts]) -> str:
    rows = []
    for run in runs:
        for row in run["rows"]:
            if row["classes"] in SHOWN or row is run["rows"][-1]:
                parts = [
                    f"{row[part]:.1f} ± {row[f'{part}_half_width']:.1f}" if part in row else ""
                    for part in ("old", "new", "all")
                ]
                rows.append([_where(run), str(row["classes"]), *parts])
    return markdown(["memory", "classes", "old", "new", "all"], rows)


def _continual_chart(runs: Sequence[Facts]) -> Any:
    import altair as alt

    points = [
        {"memory": _where(run), "classes": row["classes"], "accuracy": row["all"]}
        for run in runs
        for row in run["rows"]
    ]
    lines: Any = alt.Chart(alt.Data(values=points), width=420, height=220).mark_line()
    return lines.encode(
        x=alt.X("classes:Q", title="classes learnt"),
        y=alt.Y("accuracy:Q", title="accuracy on all, %", scale=alt.Scale(zero=False)),
        color=alt.Color("memory:N", title=None),
    )
