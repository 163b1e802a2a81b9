"""Draw docs/figure.svg from an audit's store: python docs/figure.py NETWORK.safetensors STORE."""

import sys
from pathlib import Path

import vl_convert

import evenkeel as ek
from evenkeel.data import digits

network, store = sys.argv[1:]
audit = ek.audit(
    ek.load(network),
    digits(),
    store=store,
    devices=["pcm"],
    remedies=["none", "drift", "calibrate"],
)
chart = audit.plot().properties(width=560, height=240)
chart = chart.configure(background="white", font="sans-serif", padding=12)
Path(__file__).with_name("figure.svg").write_text(vl_convert.vegalite_to_svg(chart.to_json()))
