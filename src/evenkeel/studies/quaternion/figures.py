"""The study's tables."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from evenkeel.audit.plan import age_label
from evenkeel.audit.verdict import points
from evenkeel.files import write_atomically
from evenkeel.studies.frame import Facts, cells_of, markdown
from evenkeel.studies.measures import interval

HEAD = """# Quaternion layers: figures

Written by `evenkeel study quaternion`. Auto-encoders trained on kodim05 in grey; measured on the
other 23 pictures, in colour. Mean over pictures, and the 95 % interval over seeds."""
MEASURES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "chroma_ratio": "chroma energy, share of the picture's",
    "chroma_correlation": "chroma correlation",
}


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """Tables of all pictures, and of the three that are shown."""
    runs = [run for name in sorted(done) if name.startswith("colour") for run in done[name]["runs"]]
    sections = [HEAD]
    if runs:
        sections += [_over_pictures(runs), *(_one(runs, name) for name in _shown(runs))]
    if "audits" in done:
        sections += [_audit(kind, figures) for kind, figures in done["audits"].items()]
    if "residual" in done:
        sections.append(_residual(done["residual"]["runs"]))
    path = folder / "tables.md"
    write_atomically(path, ("\n\n".join(sections) + "\n").encode())
    return [path]


def _audit(kind: str, figures: Facts) -> str:
    cells = cells_of(figures)
    rows = [
        [
            cell.device,
            age_label(cell.age_s),
            cell.remedy,
            points(cell),
            "" if cell.gain is None else f"{cell.gain:+.1f}",
            "" if cell.recovered is None else f"{100 * cell.recovered:.0f} %",
        ]
        for cell in cells
    ]
    heads = ["device", "age", "remedy", "PSNR", "gain, dB", "recovered"]
    title = f"## {kind} auto-encoder on chips; digital {figures['digital']:.1f} dB"
    return f"{title}\n\n{markdown(heads, rows)}"


def _residual(runs: Sequence[Facts]) -> str:
    rows = []
    for name in dict.fromkeys(run["network"] for run in runs):
        own = [run for run in runs if run["network"] == name]
        errors = [run["epochs"][-1]["error"] for run in own]
        seconds = [epoch["seconds"] for run in own for epoch in run["epochs"]]
        accuracies = interval([100 - e for e in errors])
        rows.append(
            [name, f"{own[0]['parameters']:,}", str(len(own)), accuracies, f"{median(seconds):.0f}"]
        )
    heads = ["network", "parameters", "seeds", "test accuracy, %", "seconds an epoch"]
    return f"## residual networks on CIFAR-10\n\n{markdown(heads, rows)}"


def _shown(runs: Sequence[Facts]) -> list[str]:
    return [name for name in ("kodim04", "kodim14", "kodim23") if name in runs[0]["pictures"]]


def _over_pictures(runs: Sequence[Facts]) -> str:
    rows = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        own = [run for run in runs if run["kind"] == kind]
        means = [
            [fmean(picture[measure] for picture in run["pictures"].values()) for run in own]
            for measure in MEASURES
        ]
        grey = interval([run["grey_psnr"] for run in own])
        rows.append([kind, f"{own[0]['parameters']:,}", grey, *map(interval, means)])
    heads = ["auto-encoder", "parameters", "PSNR on the grey picture", *MEASURES.values()]
    return f"## all pictures\n\n{markdown(heads, rows)}"


def _one(runs: Sequence[Facts], name: str) -> str:
    rows = [
        [
            kind,
            *(
                interval([r["pictures"][name][measure] for r in runs if r["kind"] == kind])
                for measure in MEASURES
            ),
        ]
        for kind in dict.fromkeys(run["kind"] for run in runs)
    ]
    return f"## {name}\n\n{markdown(['auto-encoder', *MEASURES.values()], rows)}"
