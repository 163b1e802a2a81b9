"""Draw docs/figure.svg from an audit: python docs/figure.py NETWORK.safetensors STORE."""

import sys
from pathlib import Path

import evenkeel as ek
from evenkeel.data import digits


def draw(network: str, store: str) -> None:
    """Accuracy against age, raw and mended, in the page's light colours."""
    import vl_convert

    remedies = ["none", "drift", "calibrate"]
    audit = ek.audit(ek.load(network), digits(), store=store, devices=["pcm"], remedies=remedies)
    chart = audit.plot().properties(width=560, height=240)
    chart = chart.configure(background="white", font="sans-serif", padding=12)
    Path(__file__).with_name("figure.svg").write_text(vl_convert.vegalite_to_svg(chart.to_json()))


if __name__ == "__main__":
    draw(*sys.argv[1:])
