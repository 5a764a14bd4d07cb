"""No wrong number without a word: what somebody who edits the code would not notice."""

import unittest
from unittest import mock

import torch

import attack
import pretrain
from model import DEFENSES, De3, NoiseScale, UserError
from support import cli, data, run, training
from tests.helpers import (assert_refused, finished, linear_on_digits, new_folder, photo_autoencoder, photo_flags,
                           photos, random_images, small_autoencoder, small_classifier)
from tests.helpers import run as run_stage
from tests.helpers import training as short


class TwoRounds(De3):
    """A cascade whose level says the first sigma only."""

    def __init__(self, autoencoder, classifier, sigmas, **settings):
        sigmas = [NoiseScale.parse(text) for text in str(sigmas).split(",")]
        super().__init__(autoencoder, classifier, sigmas[0], **settings)
        self.sigmas = sigmas


class TestSilent(unittest.TestCase):
    def test_settings_of_a_defense(self):
        """Two defenses that differ in a list of noise scales are two, and cannot have one name in a table."""
        parts = small_autoencoder(), small_classifier()
        one, other = TwoRounds(*parts, "50,20"), TwoRounds(*parts, "50,5")
        self.assertEqual(one.level, other.level)
        self.assertNotEqual(run.fingerprint(one), run.fingerprint(other))
        with mock.patch.dict(DEFENSES, rounds=TwoRounds):
            result = run_stage("attack", "assets/digits/de3", "--defense", "rounds:50,20", "rounds:50,5", "--images",
                               4, "--out", new_folder())
        assert_refused(result, ("two different defenses are called", "TwoRounds"))

    def test_borrowed_autoencoder(self):
        """A run without one takes that of another run in the same command, and it is said."""
        out, clean = new_folder(), "assets/digits/clean"
        flags = ("--defense", "off", "de3:0", "--images", 4, "--attack", "fgsm", "--out", out)
        result = finished(run_stage("attack", "assets/digits/de3", clean, *flags))
        self.assertIn(f"{clean} holds no autoencoder: that of assets/digits/de3 is put in front", result.out)
        self.assertIn("clean behind De³, σ = 0", result.out)
        assert_refused(run_stage("attack", clean, *flags), "holds no autoencoder")

    def test_images_outside_the_range(self):
        """A classifier alone is scored on images in [0, 1] only."""
        model, (images, labels) = linear_on_digits()
        for bad in (255 * images, images + 0.5, images * float("nan")):
            with self.assertRaisesRegex(UserError, r"\[0, 1\]"):
                attack.accuracy(model, bad, labels)

    def test_augmentation_outside_the_range(self):
        def brighter(images):
            return images + 0.5
        training.check_augmentation(None, random_images())
        training.check_augmentation(training.crop_and_flip, random_images())
        with self.assertRaisesRegex(UserError, "brighter"):
            training.check_augmentation(brighter, random_images())

    def test_size_without_a_recipe(self):
        without = {name: recipe for name, recipe in pretrain.RECIPES.items() if not name.startswith("tiny")}
        with mock.patch.object(pretrain, "RECIPES", without):
            result = run_stage("pretrain", *photo_flags(), "--out", new_folder())
        assert_refused(result, "no recipe for size 'tiny'")

    def test_another_augmentation_on_resume(self):
        out, nim = new_folder(), ("--autoencoder", photo_autoencoder())
        finished(run_stage("finetune", *nim, *short(1), "--workers", 0, "--out", out))

        def flip(images):
            return images.flip(3)
        row = data.about(str(photos()))._replace(finetune_augment=flip)
        with mock.patch.object(data, "about", lambda dataset: row):
            result = run_stage("finetune", *nim, "--out", out, "--resume")
        assert_refused(result, ("augmentation was crop_and_flip", "is flip"))

    def test_what_is_shown_is_what_is_saved(self):
        """The accuracy at the end of fine-tuning is that of the folder, whatever the script has in memory."""
        out, nim = new_folder(), ("--autoencoder", photo_autoencoder())
        built = []
        whole = run.build_whole

        def watched(*arguments):
            built.append(whole(*arguments))
            return built[-1]
        with mock.patch.object(run, "build_whole", watched), \
                mock.patch("finetune.accuracy", wraps=attack.accuracy) as scored:
            finished(run_stage("finetune", *nim, *short(1), "--workers", 0, "--out", out))
        self.assertIs(scored.call_args.args[0], built[-1])

    def test_processes_that_drift_apart(self):
        """All that is trained has to be equal in all processes at the end."""
        def reduce_with_another(extremes, operation):
            torch.maximum(extremes, torch.tensor([5.0, -3.0], dtype=torch.float64), out=extremes)
        with mock.patch("torch.distributed.is_initialized", return_value=True), \
                mock.patch("torch.distributed.all_reduce", reduce_with_another), \
                self.assertRaisesRegex(UserError, "different weights"):
            training.check_processes(small_classifier())

    def test_draws_are_repeated(self):
        """NumPy's and Python's random numbers follow the seed as PyTorch's do, and go on as before."""
        import random

        import numpy as np

        def draw():
            return torch.rand(()).item(), np.random.rand(), random.random()
        cli.seed_everything(3)
        first = draw()
        with cli.repeated_draws(3):
            self.assertEqual(draw(), first)
        second = draw()
        cli.seed_everything(3)
        self.assertEqual((draw(), draw()), (first, second))


if __name__ == "__main__":
    unittest.main()
