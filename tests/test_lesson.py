"""The lesson runs from top to bottom, and its answers quote the figures that its cells find."""

import contextlib
import io
import json
import os
import re
import sys
import unittest
from unittest import mock

from tests.helpers import REPOSITORY

try:
    import matplotlib
except ImportError:
    matplotlib = None

NOTEBOOK = REPOSITORY / "studies/lesson.ipynb"
TOLERANCE = 4  # percentage points: another processor rounds differently, and an image is 1.7 of 60


def cells(kind):
    """The cells of a kind, "code" or "markdown", as texts."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


class TestLesson(unittest.TestCase):
    @unittest.skipIf(matplotlib is None, "needs matplotlib")
    def test_all_cells(self):
        matplotlib.use("Agg")
        names, folder = {}, os.getcwd()
        os.chdir(NOTEBOOK.parent)  # where jupyter starts it
        try:
            with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(sys, "path", list(sys.path)):
                for text in cells("code"):
                    exec(compile(text, str(NOTEBOOK), "exec"), names)
        finally:
            os.chdir(folder)
        quoted = re.findall(r"\*\*([^*:]+): (-?\d+)\*\*", "\n".join(cells("markdown")))
        self.assertGreater(len(quoted), 8)
        for name, value in quoted:
            with self.subTest(name):
                self.assertAlmostEqual(names["figures"][name], int(value), delta=TOLERANCE)

    def test_kept_outputs(self):
        """Every code cell was run, in order, and shows what it found; every step asks a question."""
        notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
        counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
        self.assertEqual(counts, list(range(1, len(counts) + 1)))
        text = "\n".join(cells("markdown"))
        questions = re.findall(r"\*\*Question (\d+)", text)
        self.assertEqual(questions, [str(number + 1) for number in range(len(questions))])
        for number in questions:
            self.assertIn(f"\n{number}. ", text.split("## Answers")[1])
