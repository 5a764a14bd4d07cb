"""The commands that the texts show."""

import contextlib
import importlib
import io
import re
import shlex
import unittest
from unittest import mock

import model
from tests.helpers import REPOSITORY

TEXTS = ("README.md", "studies/README.md", "studies/RESULTS.md", "studies/EXERCISES.md")
COMMAND = re.compile(r"python (?:-m )?(pretrain|finetune|defend|attack|studies\.\w+)(?:\.py)?( [^`|\n#]*)?")


def commands(text):
    """(module, its arguments) of each command in a text; one that is cut short by "..." is none."""
    for name, rest in COMMAND.findall(text):
        if "..." not in rest:
            yield name, shlex.split(rest.split("&&")[0].replace("$R", "runs"))


class TestCommands(unittest.TestCase):
    """Every command in a README, the results or the exercises is one that the scripts understand."""

    def test_all(self):
        seen = 0
        for name in TEXTS:
            text = (REPOSITORY / name).read_text(encoding="utf-8")
            for module, words in commands(text):
                with self.subTest(text=name, module=module, words=words), \
                        contextlib.redirect_stderr(io.StringIO()) as said, \
                        mock.patch.dict(model.NOISE_LAWS, lognormal=model.NOISE_LAWS["gamma"]):
                    try:
                        importlib.import_module(module).arguments(words)
                    except SystemExit:
                        reason = said.getvalue().strip().splitlines()[-1]
                        if "choose from" not in reason:  # an entry that an exercise adds
                            self.fail(reason)
                    seen += 1
        self.assertGreater(seen, 60)


if __name__ == "__main__":
    unittest.main()
