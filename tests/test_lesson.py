"""The lesson runs from top to bottom, and its answers quote the figures that its cells find."""

import contextlib
import io
import json
import os
import re
import sys
import textwrap
import unittest
from unittest import mock

import torch

from attack import input_gradient, pgd
from tests.helpers import REPOSITORY, assert_near, random_images, small_classifier

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

    def test_attack_for_a_slide(self):
        """The few lines of PGD in the answers find exactly what pgd finds without a random start."""
        text = cells("markdown")[-1].partition("def my_pgd")[2].partition("return x")[0]
        lines = textwrap.dedent(f"       def my_pgd{text}return x")
        self.assertLessEqual(len(lines.splitlines()), 7)
        names = dict(input_gradient=input_gradient, torch=torch)
        exec(lines, names)
        model, images = small_classifier(), random_images(6, 3, 16, 16)
        labels = model(images).argmax(1)
        for eps in (0.02, 0.3):
            expected = pgd(model, images, labels, eps, steps=20, random_start=False)
            assert_near(names["my_pgd"](model, images, labels, eps), expected, atol=1e-6)
            self.assertGreater((expected - images).abs().max(), 0.9 * eps)

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
