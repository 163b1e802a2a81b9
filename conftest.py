"""The code in README and docs is run, and must print what it says."""

import importlib.util
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

torch.set_num_threads(1)  # the networks are small: more threads only wait for each other

if importlib.util.find_spec("triton") is None:  # as on machines that it is not made for
    collect_ignore = ["src/evenkeel/moments/kernels.py"]

CODE = PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)
pytest_collect_file = Sybil(
    parsers=[CODE, SkipParser()],
    patterns=["README.md", "docs/**/*.md"],
).pytest()
