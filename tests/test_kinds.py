"""A new kind of thing is one entry in one table: noise law, attack, defense, data set."""

import contextlib
import io
import sys
import types
import unittest
from unittest import mock

import torch
from torch import nn
from torch.utils.data import TensorDataset

import attack
import model
from attack import ATTACKS, Attack, pgd
from model import DEFENSES, NOISE_LAWS, Defense, NoiseLaw, NoiseScale, UserError
from studies import audit, compare, tables
from support import data, training, weights
from support import run as run_module
from tests.helpers import (REPOSITORY, assert_near, assert_refused, finished, new_folder,
                           photo_autoencoder, photo_classifier, photos, random_images, read_csv, run,
                           seeded)
from tests.helpers import training as short_training


def with_entry(table, **entry):
    """An entry of one of the tables, while it lasts."""
    return mock.patch.dict(table, entry)


def help_of(script):
    """What python SCRIPT.py --help prints, in one line."""
    with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch("sys.argv", [script, "--help"]):
        with contextlib.suppress(SystemExit):
            __import__(script).arguments()
    return " ".join(out.getvalue().split())


# ------------------------------------------------------------------------------------ noise laws

def draw_three(batch_size, device, low, middle, high):
    """One of three values with equal probability."""
    return torch.tensor([low, middle, high], device=device)[torch.randint(3, (batch_size,))]


THREE = NoiseLaw("LOW,MIDDLE,HIGH", lambda low, middle, high: 0 <= low <= middle <= high, draw_three)


class TestNoiseLaw(unittest.TestCase):
    def test_parse_and_draw(self):
        with with_entry(NOISE_LAWS, three=THREE):
            scale = NoiseScale.parse("three:10,25.5,200")
            self.assertEqual(scale, NoiseScale("three", (10, 25.5, 200)))
            self.assertEqual(str(scale), "three:10,25.5,200")
            self.assertEqual(NoiseScale.parse(str(scale)), scale)
            self.assertIsNone(scale.fixed)
            drawn = seeded(scale.draw, 600)
            self.assertEqual(drawn.shape, (600,))
            self.assertEqual(drawn.unique().tolist(), [10, 25.5, 200])
            self.assertTrue(all(150 < (drawn == value).sum() < 250 for value in (10, 25.5, 200)))
            for text in ("three:1,2", "three:3,2,1", "three:1,2,3,4", "three:-1,2,3", "three:1,2,nan",
                         "three:1,2,1e9", "three"):
                self.assertRaises(UserError, NoiseScale.parse, text)
            defense = model.NoiseOnly(None, nn.Flatten(), "three:0,0,100")
            spread = seeded(defense.purify, torch.full((200, 3, 8, 8), 0.5)).flatten(1).std(1)
            self.assertTrue(0.2 < (spread > 0.1).double().mean() < 0.5)
        self.assertRaises(UserError, NoiseScale.parse, "three:10,25.5,200")

    def test_trained_on(self):
        """pretrain.py --sigma takes it, and the checkpoint says it."""
        out = new_folder() / "nim"
        with with_entry(NOISE_LAWS, three=THREE):
            finished(run("pretrain", "--sigma", "three:10,20,30", *short_training(1, 600), "--out", out))
            self.assertEqual(run_module.read(out)["settings"]["sigma"], "three:10,20,30")
            kept = finished(run("pretrain", "--sigma", "three:10,20,30", *short_training(1, 600),
                                "--out", out))
            self.assertIn("finished run kept", kept.out)
            refused = run("pretrain", "--sigma", "three:10,20,31", *short_training(1, 600), "--out", out)
            assert_refused(refused, ("three:10,20,30", "three:10,20,31"))
            finished(run("finetune", "--autoencoder", out, "--sigma", "three:0,0,9", "--dry-run"))

    def test_help(self):
        """One line in model.py is also in the help and in what an error says."""
        source = (REPOSITORY / "model.py").read_text()
        self.assertEqual(source.count("NOISE_LAWS = {\n"), 1)
        line = '    "fixed": NoiseLaw("VALUE", lambda value: value >= 0, lambda n, on, value: value),\n'
        changed = types.ModuleType("changed_model")
        with mock.patch.dict(sys.modules, changed_model=changed):
            exec(source.replace("NOISE_LAWS = {\n", "NOISE_LAWS = {\n" + line), vars(changed))
            for text in (model.SIGMA_HELP, changed.SIGMA_HELP):
                self.assertEqual("fixed:VALUE" in text, text is changed.SIGMA_HELP)
                self.assertIn("gamma:SHAPE,SCALE", text)
            self.assertEqual(str(changed.NoiseScale.parse("fixed:5")), "fixed:5")
            with self.assertRaisesRegex(changed.UserError, "fixed:VALUE"):
                changed.NoiseScale.parse("fixed:-5")
        for script in ("pretrain", "finetune"):
            self.assertIn(model.SIGMA_HELP, help_of(script))


# --------------------------------------------------------------------------------------- attacks

def momentum(model, images, labels, eps, steps, step_size, norm, restarts, eot, loss, early_stop):
    """The sign of a running mean of gradients, from the image: another attack with pgd's arguments."""
    x, mean = images.clone(), torch.zeros_like(images)
    for _ in range(steps):
        gradient, _ = attack.input_gradient(model, x, labels, None, loss, eot)
        mean = 0.9 * mean + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
        x = attack.project(x + step_size * mean.sign(), images, eps, norm)
    return x


class TestAttack(unittest.TestCase):
    def test_by_name(self):
        """NAME and NAME+eot; the second one averages its gradients, and the rows say so."""
        out, calls = new_folder(), []

        def counted(model, images, labels, eps, steps, **settings):
            calls.append((settings["eot"], steps, settings["step_size"]))
            return momentum(model, images, labels, eps, steps, **settings)
        flags = ("--sigma", 0, 50, "--images", 6, "--eps", "8/255", "--steps", 3, "--eot", 4,
                 "--workers", 0)
        with with_entry(ATTACKS, tried=Attack(counted)):
            self.assertIn("tried,tried+eot", help_of("attack"))
            finished(run("attack", photo_classifier(), *flags, "--attack", "tried", "tried+eot",
                         "pgd+eot", "--out", out))
        rows = read_csv(out / "attack.csv")
        self.assertEqual([(row["level"], row["attack"], row["eot"], row["draws"]) for row in rows], [
            ("σ = 0", "tried", "1", "1"), ("σ = 0", "pgd+eot", "1", "1"),
            ("σ = 50", "tried", "1", "5"), ("σ = 50", "tried+eot", "4", "5"),
            ("σ = 50", "pgd+eot", "4", "5")])
        step = 2.5 * 8 / 255 / 3
        self.assertEqual(calls, [(1, 3, step), (1, 3, step), (4, 3, step)])
        assert_refused(run("attack", photo_classifier(), "--attack", "tried"), "tried")

    def test_eot_is_applied(self):
        """So many draws of the defense in every step, and no more."""
        classifier, (images, labels) = nn.Flatten(), (random_images(), torch.arange(4))
        defense, calls = model.NoiseOnly(None, classifier, 50), []
        classifier.register_forward_pre_hook(lambda module, x: calls.append(len(x[0])))
        for function in (pgd, momentum):
            for eot in (1, 5):
                calls.clear()
                settings = dict(steps=3, step_size=0.01, restarts=1, eot=eot, early_stop=False)
                correct = attack.attack_batches(function, defense, defense, [(images, labels)], 0.1,
                                                "linf", ["ce"], 7, settings)
                self.assertEqual(sum(calls), 4 * (3 * eot + 7))
                self.assertEqual(correct.shape, (4,))

    def test_own_settings(self):
        """Those of an entry come before the flags'."""
        seen, out = [], new_folder()

        def quick(model, images, labels, eps, **settings):
            seen.append((eps, settings))
            return images
        entry = Attack(quick, lambda eps: dict(steps=2, step_size=eps / 2, extra="x"))
        with with_entry(ATTACKS, quick=entry):
            finished(run("attack", photo_classifier("clean"), "--attack", "quick", "--images", 3,
                         "--steps", 9, "--loss", "ce", "margin", "--eps", 0.1, "--restarts", 2,
                         "--out", out))
        names = ("steps", "step_size", "extra", "restarts", "loss")
        self.assertEqual([(eps, *[settings[name] for name in names]) for eps, settings in seen],
                         [(0.1, 2, 0.05, "x", 2, loss) for loss in ("ce", "margin")])
        row, = read_csv(out / "attack.csv")
        self.assertEqual((row["attack"], row["steps"], row["step_size"], row["loss"]),
                         ("quick", "2", "0.05", "ce+margin"))

    def test_leaving_the_ball(self):
        """Any attack is checked."""
        with with_entry(ATTACKS, far=Attack(lambda model, images, *_, **settings: 1 - images)):
            refused = run("attack", photo_classifier("clean"), "--attack", "far", "--eps", 0.01,
                          "--images", 3, "--out", new_folder())
        assert_refused(refused, "left the ball")


# -------------------------------------------------------------------------------------- defenses

class Rounded(Defense):
    """Pixels in so many gray levels; the gradient is that of the identity."""
    title, levels, is_random = "rounded", (2, 4), False

    def __init__(self, autoencoder, classifier, grays, **settings):
        super().__init__(autoencoder, classifier, **settings)
        self.grays = int(grays)

    @property
    def level(self):
        return f"{self.grays} grays"

    def purify(self, images):
        rounded = (images * (self.grays - 1)).round() / (self.grays - 1)
        return rounded.detach() + images - images.detach()


class Dithered(Rounded):
    """The same with noise before it, and without a word that it is random."""
    title = "dithered"

    def purify(self, images):
        return super().purify((images + 0.2 * torch.randn_like(images)).clamp(0, 1))


class TestDefense(unittest.TestCase):
    FLAGS = ("--images", 6, "--eps", "8/255", "--workers", 0)

    def setUp(self):
        patch = with_entry(DEFENSES, rounded=Rounded, dithered=Dithered)
        patch.start()
        self.addCleanup(patch.stop)
        self.out = new_folder()

    def test_attack(self):
        """In front of every classifier, at its levels or the one given, under its own title."""
        finished(run("attack", photo_classifier("clean"), photo_classifier(), *self.FLAGS,
                     "--attack", "fgsm", "--defense", "rounded:3", "off", "rounded", "--out", self.out))
        rows = read_csv(self.out / "attack.csv")
        expected = [("rounded 3 grays", "3 grays"), ("undefended", "off"),
                    ("rounded 2 grays", "2 grays"), ("rounded 4 grays", "4 grays")]
        self.assertEqual([(row["defense"].partition(" (")[0], row["level"]) for row in rows],
                         2 * expected)
        self.assertEqual([row["run"] for row in rows],
                         [folder.as_posix() for folder in (photo_classifier("clean"), photo_classifier())
                          for _ in range(4)])
        self.assertEqual({row["draws"] for row in rows}, {"1"})
        self.assertEqual(len({row["weights"] for row in rows}), 8)
        classifier, _ = run_module.load(photo_classifier("clean"), "classifier")
        six = data.evenly_spread(data.load_dataset(str(photos()), "val", 32), 6)
        (images, labels), = data.Loader(six, 6)
        correct = (classifier((images * 2).round() / 2).argmax(1) == labels).float().mean().item()
        self.assertAlmostEqual(float(rows[0]["clean_accuracy"]), 100 * correct, delta=0.01)

    def test_random_without_saying_so(self):
        """Found out: attacked with EOT, and scored on several draws."""
        draws, purify = [], Dithered.purify

        def counted(self, images):
            draws.append((len(images), images.requires_grad))
            return purify(self, images)
        with mock.patch.object(Dithered, "purify", counted):
            finished(run("attack", photo_classifier("clean"), *self.FLAGS, "--attack", "pgd", "pgd+eot",
                         "--steps", 2, "--eot", 5, "--max-batch", 6, "--defense", "dithered:9",
                         "--out", self.out))
        rows = read_csv(self.out / "attack.csv")
        self.assertEqual([(row["attack"], row["eot"], row["draws"]) for row in rows],
                         [("pgd", "1", "5"), ("pgd+eot", "5", "5")])
        self.assertEqual(sum(images for images, differentiated in draws if differentiated),
                         6 * (2 * 1 + 2 * 5))
        finished(run("attack", photo_classifier("clean"), *self.FLAGS, "--attack", "pgd", "pgd+eot",
                     "--defense", "rounded:9", "--out", self.out))
        row = read_csv(self.out / "attack.csv")[2]
        self.assertEqual((row["attack"], row["draws"]), ("pgd", "1"))

    def test_its_code_counts(self):
        """The file of its class is part of what decides its rows, and none of others'."""
        classifier, _ = run_module.load(photo_classifier("clean"), "classifier")
        digests = run_module.digests

        def edited(files):
            return {**digests(files),
                    **{name: "edited" for name in files if name == "tests/test_kinds.py"}}
        codes = []
        for change in (digests, edited):
            with mock.patch.object(run_module, "digests", change):
                codes.append([run_module.origin_of_row(one, attack.CODE)["code"] for one in
                              (Rounded(None, classifier, 3), classifier)])
        self.assertNotEqual(codes[0][0], codes[1][0])
        self.assertEqual(codes[0][1], codes[1][1])

    def test_defend(self):
        """Accuracy, picture, and photographs."""
        source = ("--run", photo_classifier("clean"), "--defense", "off", "rounded:2", "--out", self.out)
        result = finished(run("defend", *source, *self.FLAGS, "--steps", 1, "--eot", 2))
        self.assertRegex(result.out, r"rounded 2 grays +[\d.]+ +[\d.]+ ")
        self.assertTrue((self.out / "defend.png").exists())
        result = finished(run("defend", photos() / "val" / "red" / "0.png", *source))
        self.assertRegex(result.out, "rounded 2 grays: (red|green|blue)")
        self.assertEqual(len(list((self.out / "purified").iterdir())), 1)

    def test_audit(self):
        with mock.patch.object(audit, "FEWEST_IMAGES", 6), mock.patch.object(audit, "QUERIES", 1):
            result = run("studies.audit", photo_classifier("clean"), "--defense", "off", "rounded:3",
                         *self.FLAGS, "--steps", 1, "--eot", 1, "--draws", 1)
        self.assertIn("audit of rounded 3 grays", result.out)
        for check in ("gray-box", "ten votes", "the clamp's own gradient", r"another model \(1\)"):
            self.assertRegex(result.out, rf"(holds|SUSPICIOUS) .*{check}")

    def test_compare(self):
        """In a table of the comparison, by name; a random one without a noise to know."""
        entries = [tables.Entry("gray", "clean", "--mode clean", defenses=("rounded:3", "dithered:3"))]
        table = tables.Table({"nim": ""}, entries, images=6, l2=0.0)
        at = photo_classifier("clean").parent
        (at / "nim").symlink_to(photo_autoencoder())
        self.addCleanup((at / "nim").unlink)
        with mock.patch.dict(tables.TABLES, small=table), \
                mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
            finished(run("studies.compare", "small", "--data", photos(), "--at", at, "--steps", 1,
                         "--eot", 3, "--workers", 0))
        rows = read_csv(at / "compare.csv")
        self.assertEqual([(row["defense"], row["level"]) for row in rows], 2 * [("gray", "3 grays")])
        self.assertEqual([row["noise_known"] == "" for row in rows], [False, True])
        self.assertEqual({call.kwargs["eot"] for call in attacks.call_args_list
                          if isinstance(call.args[0], Dithered) and "eot" in call.kwargs}, {3})
        self.assertNotEqual(rows[0]["weights"], rows[1]["weights"])

    def test_put_in_front(self):
        """The options of the run belong to its own defense alone; a missing autoencoder is said."""
        checkpoint = dict(defense="mim", options=dict(keep_visible=True), settings={}, config={})
        autoencoder = nn.Identity()
        found = weights.put_in_front("runs/x", nn.Flatten(), checkpoint, autoencoder,
                                     [("mim", 0.5), ("rounded", "5"), ("", None), ("de3", "9")], votes=3)
        self.assertEqual([one.words for one in found], ["MIM mask 0.5, visible kept", "rounded 5 grays",
                                                        "undefended", "De³ σ = 9"])
        self.assertEqual([one.defense.votes for one in found if one.defense], [3, 3, 3])
        with self.assertRaisesRegex(UserError, "no autoencoder for De³"):
            weights.put_in_front("runs/x", nn.Flatten(), checkpoint, None, [("de3", "9")])
        assert_refused(run("attack", photo_classifier("clean"), "--defense", "square:3"),
                       ("'square'", "rounded"))

    def test_trained_behind(self):
        """A run that was trained behind it is tested behind it, at its levels."""
        folder = new_folder() / "trained"
        folder.mkdir()
        checkpoint = torch.load(photo_classifier("clean") / "checkpoint.pt")
        torch.save({**checkpoint, "defense": "rounded"}, folder / "checkpoint.pt")
        finished(run("attack", folder, *self.FLAGS, "--attack", "fgsm", "--out", self.out))
        levels = [row["level"] for row in read_csv(self.out / "attack.csv")]
        self.assertEqual(levels, ["2 grays", "4 grays"])

    def test_any_module(self):
        """Without this class: the readings and the audit take any model, and find out what is random."""
        class Shaky(nn.Module):
            def forward(self, x):
                return x[:, :, 0, :3].sum(1) + 0.1 * torch.randn(len(x), 3)
        images, labels = random_images(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
        with mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
            found = compare.measure(Shaky(), [(images, labels)], 0.05, 0.5, 2, 4, 0)
        self.assertEqual(sorted(call.kwargs.get("eot", 1) for call in attacks.call_args_list),
                         [1, 4, 4, 4])
        self.assertLessEqual(found["ten_tries"], found["one_shot"])
        self.assertNotIn("noise_known", found)


# ------------------------------------------------------------------------------------- data sets

def load_stripes(split, image_size):
    """Two classes of 20 images in memory: bright rows or bright columns."""
    rows = (torch.arange(image_size) // 4 % 2).float().view(1, 1, -1, 1).expand(10, 3, -1, image_size)
    brightness = 0.5 + 0.4 * random_images(20, 1, 1, 1, seed=len(split))
    images = torch.cat([rows, rows.transpose(2, 3)]) * brightness
    dataset = TensorDataset(images.contiguous(), torch.arange(20) // 10)
    dataset.classes = ["row", "column"]
    return dataset


STRIPES = data.DataSet(load_stripes, size="tiny", mean=(0.4,) * 3, std=(0.4,) * 3, pretrain_sigma="90",
                       finetune_sigma="uniform:0,99", test_sigmas=(0, 33), eps=2 / 255,
                       attack_eps=(3 / 255,), pretrain_augment=None, finetune_augment=None)


class TestDataSet(unittest.TestCase):
    def test_checked_before_training(self):
        """Pixels from 0 to 255 as floats, and labels that are no class numbers."""
        good = load_stripes("train", 32)
        pixels, labels = good.tensors
        for tensors, words in (((255 * pixels, labels), r"must lie in \[0, 1\]"),
                               ((pixels, labels.int()), "class numbers"), ((pixels, labels + 1), "from 0 to 1")):
            dataset = TensorDataset(*tensors)
            dataset.classes = good.classes
            row = STRIPES._replace(open=lambda split, image_size, dataset=dataset: dataset)
            with with_entry(data.DATASETS, stripes=row):
                with self.assertRaisesRegex(UserError, words):
                    data.load_dataset("stripes", "train", 32)

    def test_order_of_classes(self):
        """Validation images take the classifier's."""
        plain, classes = data.load_heldout(str(photos()), 32, 0), ["red", "green", "blue"]
        reordered = data.load_heldout(str(photos()), 32, 0, classes=classes)
        names = data.load_dataset(str(photos()), "val", 32).classes
        self.assertNotEqual(names, classes)
        self.assertEqual([classes[int(label)] for _, label in reordered], [names[int(label)] for _, label in plain])
        with self.assertRaisesRegex(UserError, "same classes"):
            data.load_heldout(str(photos()), 32, 0, classes=["red", "green"])

    def test_through_the_stages(self):
        """Opened, with its own size, statistics, sigmas and radii, where nothing else is said."""
        out = new_folder()
        short = (*short_training(2), "--workers", 0)
        with with_entry(data.DATASETS, stripes=STRIPES), \
                mock.patch.object(training, "crop_and_flip", side_effect=AssertionError):
            finished(run("pretrain", "--data", "stripes", *short, "--out", out / "nim"))
            finished(run("finetune", "--autoencoder", out / "nim", *short))
            defended = finished(run("defend", "--run", out / "de3", "--steps", 1, "--eot", 1))
            finished(run("attack", out / "de3", "--attack", "fgsm"))
            assert_refused(run("pretrain", "--data", out / "none"),
                           ", stripes, or a folder")
        checkpoint = run_module.read(out / "de3")
        settings = checkpoint["settings"]
        self.assertEqual((checkpoint["classes"], checkpoint["data"]["name"], settings["size"],
                          settings["sigma"]), (["row", "column"], "stripes", "tiny", "uniform:0,99"))
        self.assertEqual(checkpoint["autoencoder"]["settings"]["sigma"], "90")
        model = run_module.build(checkpoint)
        assert_near(torch.cat([model.mean.flatten(), model.std.flatten()]), torch.full((6,), 0.4))
        self.assertIn("20 test images of stripes", defended.out)
        self.assertEqual([(row["level"], row["eps"]) for row in read_csv(out / "attack.csv")],
                         [("σ = 0", "0.0117647"), ("σ = 33", "0.0117647")])
        self.assertEqual({row["data"] for row in read_csv(out / "attack.csv")}, {"stripes"})


if __name__ == "__main__":
    unittest.main()
