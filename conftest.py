"""The code in README and docs is run, and must print what it says."""

from doctest import ELLIPSIS, NORMALIZE_WHITESPACE

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

torch.set_num_threads(1)  # the networks are small: more threads only wait for each other

CODE = PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)
pytest_collect_file = Sybil(
    parsers=[CODE, SkipParser()],
    patterns=["README.md", "docs/**/*.md"],
).pytest()
