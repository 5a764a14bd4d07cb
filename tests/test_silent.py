"""No wrong number without a word: what somebody who edits the code would not notice."""

import functools
import shutil
import sys
import types
import unicodedata
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import attack
import defend
import pretrain
from model import DEFENSES, NOISE_LAWS, De3, NoiseOnly, NoiseScale, UserError
from studies import compare
from support import cli, data, run, training
from tests.helpers import (assert_refused, copy_of_photos, finished, linear_on_digits, new_folder, new_python,
                           photo_autoencoder, photo_classifier, photo_flags, photos, random_images, read_csv,
                           small_autoencoder, small_classifier)
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
        with mock.patch.object(data, "about", lambda *about: row):
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


class Coin(torch.nn.Module):
    """Adds noise once in a hundred calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images + torch.randn_like(images) if torch.rand(()) < 0.01 else images)


class ByPlace(Coin):
    """The same noise at every call; which image gets which depends on its place in the batch."""

    def forward(self, images):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return self.model((images + noise).clamp(0, 1))


class DrawnWhenMade(NoiseOnly):
    """Multiplies by a mask that NumPy draws when the defense is made."""

    def __init__(self, *parts, **settings):
        super().__init__(*parts, **settings)
        self.register_buffer("mask", torch.from_numpy(np.random.rand(3, 1, 1)).float())

    def purify(self, images):
        return images * self.mask


def greedy(model, images, labels, eps, **settings):
    """An attack that changes the images it is given."""
    images += eps
    return images.clamp_(0, 1)


class TestKinds(unittest.TestCase):
    """Situations that ended in a wrong number without a word, one of each kind."""

    def test_part_of_the_images(self):
        """What is read on one image in four is read on every class, as the whole is."""
        seen = []

        def tries(model, images, labels, batch, random):
            seen.append(labels)
            return torch.ones(1, len(labels))
        labels = torch.tensor([0, 1, 2, 3] * 10)
        labels = labels[data.choose(labels)]
        model = NoiseOnly(None, small_classifier(num_classes=4), 20)
        with mock.patch.object(compare, "tries", tries), mock.patch("builtins.print"):
            compare.measure(model, random_images(40, 3, 16, 16), labels, 0.1, 0, 1, 1, 0, 40, every=4)
        counts = [labels.bincount().tolist() for labels in seen]
        self.assertEqual(counts[0], [10] * 4)
        self.assertIn([3, 3, 2, 2], counts)

    def test_images_stay(self):
        """An attack, or a defense, that changes its images in place changes no other row, and leaves the ball."""
        before = random_images()
        images = before.clone()

        def spoil(x, labels):
            return x.zero_().amax((1, 2, 3))
        attack.in_batches(spoil, images, torch.zeros(4), 2)
        attack.accuracy(lambda x: x.zero_()[:, :, 0, 0], images, torch.zeros(4, dtype=torch.long), draws=2)
        self.assertTrue(torch.equal(images, before))
        labels = torch.zeros(4, dtype=torch.long)
        attack.in_batches(lambda x, y: y.add_(1), images, labels, 2)
        self.assertEqual(labels.tolist(), [0] * 4)
        row = attack.Attack(lambda model, images, labels, eps, **settings: greedy(model, images, labels, 2 * eps))
        with mock.patch.dict(attack.ATTACKS, pgd=row):
            result = run_stage("attack", "assets/digits/clean", "--attack", "pgd", "--images", 6, "--eps", "8/255",
                               "--out", new_folder())
        assert_refused(result, "left the ball")

    def test_reloaded_module(self):
        """Others still hold what it was: refused until they are reloaded, too."""
        script = (
            "import importlib, attack, model\n"
            "command = ['assets/digits/clean', '--images', '3', '--attack', 'fgsm', '--eps', '8/255',"
            f" '--device', 'cpu', '--out', {str(new_folder())!r}]\n"
            "importlib.reload(model)\n"
            "try:\n"
            "    attack.main(command)\n"
            "except ValueError as error:\n"
            "    print(error)\n")
        printed = new_python(script)
        self.assertIn("attack.py, support/", printed)
        self.assertIn("still hold what model held before it was reloaded", printed)

    def test_file_of_ones_own(self):
        """What it holds counts in a row's code, whatever imports it."""
        model = small_classifier()
        before = run.digest_of_code_of(["model.py"], model)
        with mock.patch.dict(run._imported, {"my_losses.py": (None, "0123456789ab")}):
            self.assertNotEqual(run.digest_of_code_of(["model.py"], model), before)
            self.assertIn("my_losses.py", run.origin("python x.py", ["model.py"])["code"])
        with mock.patch.dict(run._imported, {"mine/losses.py": (None, "0123456789ab")}):  # a package
            self.assertNotEqual(run.digest_of_code_of(["model.py"], model), before)
        with mock.patch.dict(run._imported, {"studies/mine.py": (None, "0123456789ab")}):
            self.assertEqual(run.digest_of_code_of(["model.py"], model), before)
        with mock.patch.object(run, "_imported", {**run._imported}):  # imported by the first call of a model
            late = types.ModuleType("late")
            late.__file__ = str(run.REPOSITORY / "late.py")
            with mock.patch.object(run.Path, "is_file", return_value=True), \
                    mock.patch.object(run.Path, "read_text", return_value="x = 1"), \
                    mock.patch.dict(sys.modules, late=late):
                self.assertNotEqual(run.digest_of_code_of(["model.py"], model), before)

    def test_file_outside(self):
        """What a class of yours uses beside it, in a file outside the project, counts as well."""
        digests, path = [], new_folder() / "outside.py"
        for constant in (1, 1, 2):
            path.write_text(f"import torch\nSCALE = {constant}\nclass Mine(torch.nn.Module):\n    pass\n")
            module = types.ModuleType("outside")
            module.__file__ = str(path)
            with mock.patch.dict(sys.modules, outside=module):
                exec(path.read_text(), vars(module))
                digests.append(run.digest_of_code_of([], module.Mine()))
        self.assertEqual(digests[0], digests[1])
        self.assertNotEqual(digests[1], digests[2])

    def test_functions_with_arguments(self):
        """A partial of one's own counts by its function and its arguments; a noise law by its draw."""
        model = small_classifier()
        functions = [greedy, *(functools.partial(greedy, decay=decay) for decay in (1, 2))]
        digests = {run.digest_of_code_of([], model, function) for function in functions}
        self.assertEqual(len(digests), 3)
        before = run.digest_of_code_of([], model)
        law = NOISE_LAWS["gamma"]._replace(draw=lambda *values: values)
        with mock.patch.dict(NOISE_LAWS, mine=law):
            self.assertNotEqual(run.digest_of_code_of([], model), before)

    def test_palette(self):
        """A PIL image is read by its colors, whoever opened it, and not by the numbers of its palette."""
        image = Image.new("P", (32, 32), 7)
        image.putpalette([0] * 21 + [200, 100, 50] + [0] * 744)
        for read in (data.to_size(image, 32), data.as_rgb(image)):
            pixels = np.asarray(read) if isinstance(read, Image.Image) else read.permute(1, 2, 0).numpy()
            self.assertEqual(pixels[3, 4].tolist(), [200, 100, 50])
        with self.assertRaisesRegex(UserError, "8 bits"):
            data.to_size(Image.new("I", (32, 32)), 32)

    def test_images_of_the_run_it_starts_from(self):
        """Have shaped the weights, too: a test on them is noticed."""
        folder = copy_of_photos()
        flags = ("--size", "tiny", "--mode", "clean", "--from-scratch", "--workers", 0)
        first, second = new_folder(), new_folder()
        finished(run_stage("finetune", "--data", folder, *flags, *short(1), "--out", first))
        for split, other in (("train", "old"), ("val", "train"), ("old", "val")):
            (folder / split).rename(folder / other)
        finished(run_stage("finetune", "--data", folder, "--size", "tiny", "--mode", "clean", "--init", first,
                           "--workers", 0, *short(1), "--out", second))
        result = finished(run_stage("attack", second, "--attack", "fgsm", "--eps", "1/255", "--images", 24))
        self.assertIn("note: 24 of these 24 images are training images", result.out)

    def test_drawn_when_it_is_made(self):
        """By the same seed always the same."""
        weights = []
        with mock.patch.dict(DEFENSES, drawn=DrawnWhenMade):
            for seed in (1, 1, 2):
                out = new_folder()
                finished(run_stage("attack", "assets/digits/clean", "--defense", "drawn:20", "--images", 4, "--attack",
                                   "fgsm", "--eps", "8/255", "--seed", seed, "--out", out))
                weights.append(read_csv(out / "attack.csv")[0]["weights"])
        self.assertEqual(weights[0], weights[1])
        self.assertNotEqual(weights[0], weights[2])

    def test_what_needs_draws(self):
        """Whatever draws a number, however seldom it matters, and what depends on an image's place."""
        classifier, images = small_classifier(), random_images()
        wrapped = torch.nn.Sequential(De3(small_autoencoder(), classifier, 0))
        for model, expected in ((classifier, False), (wrapped, False), (Coin(classifier), True),
                                (ByPlace(classifier), True)):
            self.assertEqual(attack.needs_eot(model, images), expected, model)

    def test_one_answer(self):
        """Is said where fine-tuning ends, too."""
        out = new_folder()
        always = small_classifier(image_size=32, num_classes=3)
        torch.nn.init.zeros_(always.head.weight)
        with mock.patch("finetune.run.build_whole", return_value=always), \
                mock.patch.object(run, "check"):
            result = finished(run_stage("finetune", "--autoencoder", photo_autoencoder(), "--mode", "clean",
                                        *short(1), "--workers", 0, "--out", out))
        self.assertRegex(result.out, "answers .* for all 24 images")

    def test_one_name_in_two_spellings(self):
        """Of a class folder, within a split: one class."""
        folder = copy_of_photos()
        name = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
        for spelling, source in (("NFC", "red"), ("NFD", "green")):
            (folder / "train" / source).rename(folder / "train" / unicodedata.normalize(spelling, name))
        images = data.open_folder(folder, "train")
        self.assertEqual(images.classes, ["blue", name])
        self.assertEqual(torch.tensor(images.targets).bincount().tolist(), [8, 16])

    def test_links_and_doubles(self):
        """Each real file counts once."""
        folder = copy_of_photos()
        red = folder / "train" / "red"
        for number in range(3):
            (red / f"latest{number}.png").symlink_to(red / "0.png")
        self.assertEqual(len(data.open_folder(folder, "train")), 24)
        found = defend.find_photos([folder / "train", red, red / "1.png"])
        self.assertEqual(len(found), 24)

    def test_without_eot(self):
        """A random defense that was attacked by one draw a step only: said; not in gray-box, nor at σ = 0."""
        words = "random, and attacked without EOT, which overstates it: de3, σ = 20;"
        for flags, is_said in ((("--attack", "pgd"), True), (("--attack", "pgd", "pgd+eot"), False),
                               (("--attack", "pgd", "--threat", "gray"), False)):
            result = finished(run_stage("attack", "assets/digits/de3", "--sigma", 0, 20, "--images", 4, "--steps", 2,
                                        "--eot", 2, "--eps", "8/255", *flags, "--out", new_folder()))
            self.assertEqual(words in result.out, is_said, flags)

    def test_photographs_under_runs_of_other_classes(self):
        """No run's answers get the names of another's classes."""
        photo = photos() / "val/red/0.png"
        result = run_stage("defend", "assets/digits/clean", "assets/cifar10/clean", "--photos", photo, "--out",
                           new_folder())
        assert_refused(result, "have other classes: test them in two calls")

    def test_photographs_in_a_folder_with_an_accent(self):
        """A Mac writes it otherwise than the class is called, and it counts all the same."""
        folder = copy_of_photos()
        for split in ("train", "val"):
            (folder / split / "red").rename(folder / split / unicodedata.normalize("NFC", "réd"))
        clean = new_folder() / "clean"
        finished(run_stage("finetune", "--from-scratch", "--mode", "clean", *photo_flags(folder), *short(), "--out",
                           clean))
        mac = new_folder() / unicodedata.normalize("NFD", "réd")
        shutil.copytree(photos() / "val/red", mac)
        result = finished(run_stage("defend", clean, "--photos", mac, "--out", new_folder()))
        self.assertIn("of 8 photographs in folders named as classes", result.out)

    def test_autoencoder_that_would_not_be_used(self):
        """--autoencoder for a run that is tested behind noise alone."""
        noise_only, nim = photo_classifier("no-denoise"), photo_autoencoder()
        result = run_stage("attack", noise_only, "--autoencoder", nim, "--images", 3)
        assert_refused(result, ("--autoencoder changes nothing", "behind nothing that uses one"))

    def test_images_of_a_lent_autoencoder(self):
        """What the autoencoder in front was trained on counts, for those behind it and for no other."""
        clean, folder, out = photo_classifier("clean"), copy_of_photos(), new_folder()
        shutil.rmtree(folder / "val")
        shutil.copytree(folder / "train", folder / "val")  # all are training images, also the autoencoder's
        de3 = new_folder() / "untold"  # a classifier that knows of no images
        shutil.copytree(clean, de3)
        checkpoint = torch.load(de3 / "checkpoint.pt")
        del checkpoint["data"]["digests"]
        torch.save(checkpoint, de3 / "checkpoint.pt")
        finished(run_stage("attack", de3, "--autoencoder", photo_autoencoder(), "--sigma", "off", 0, "--data", folder,
                           "--split", "val", "--attack", "fgsm", "--eps", "8/255", "--images", 24, "--out", out))
        self.assertEqual([(row["level"], row["trained_on"]) for row in read_csv(out / "attack.csv")],
                         [("off", "0"), ("σ = 0", "24")])

    def test_defense_of_another_branch(self):
        """A run that needs an entry which model.py lacks."""
        folder = Path(shutil.copytree(photo_classifier(), new_folder() / "run"))
        checkpoint = torch.load(folder / "checkpoint.pt")
        for changes in ({"defense": "quantizer"}, {"config": {**checkpoint["config"], "arch": "mixer"}}):
            torch.save({**checkpoint, **changes}, folder / "checkpoint.pt")
            assert_refused(run_stage("attack", folder), "no entry of DEFENSES, AUTOENCODERS or CLASSIFIERS")

    def test_labels_stay(self):
        """An attack that makes targets of its labels in place is scored by the labels."""
        def targeted(model, images, labels, eps, **settings):
            labels += 1
            labels %= 10
            return images
        with mock.patch.dict(attack.ATTACKS, pgd=attack.Attack(targeted)):
            out = new_folder()
            finished(run_stage("attack", "assets/digits/clean", "--attack", "pgd", "--images", 6, "--eps", "8/255",
                               "--out", out))
        row, = read_csv(out / "attack.csv")
        self.assertEqual(row["robust_accuracy"], row["clean_accuracy"])

    def test_renamed_run(self):
        """Its figures are kept, in a row under the new name; a second time there is nothing to add."""
        first, second = new_folder() / "first", new_folder() / "second"
        shutil.copytree("assets/digits/clean", first)
        out = new_folder()
        for folder in (first, second, second):
            if folder is second and first.exists():
                first.rename(second)
            finished(run_stage("attack", folder, "--attack", "fgsm", "--images", 4, "--eps", "8/255", "--out", out))
        rows = read_csv(out / "attack.csv")
        self.assertEqual([row["defense"] for row in rows], ["first", "second"])
        self.assertEqual(len({row["robust_accuracy"] for row in rows}), 1)

    def test_kept_row_keeps_its_warning(self):
        out = new_folder()
        command = ("attack", "assets/digits/clean", "--images", 4, "--attack", "pgd", "--eps", "16/255", "--steps", 2,
                   "--step-size", "1/255", "--out", out)
        first, second = finished(run_stage(*command)), finished(run_stage(*command))
        self.assertIn("kept", second.out)
        for result in (first, second):
            self.assertIn("cannot cross the ball", result.err)


if __name__ == "__main__":
    unittest.main()
