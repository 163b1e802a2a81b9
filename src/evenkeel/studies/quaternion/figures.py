"""The study's tables."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from evenkeel.files import write_atomically
from evenkeel.studies.frame import Facts, markdown
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
    runs = [run for name in sorted(done) for run in done[name]["runs"]]
    path = folder / "tables.md"
    sections = [HEAD, _over_pictures(runs), *(_one(runs, name) for name in _shown(runs))]
    write_atomically(path, ("\n\n".join(sections) + "\n").encode())
    return [path]


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
