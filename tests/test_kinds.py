"""A new kind of thing is one entry in one table: noise law, denoiser, attack, defense, data set."""

import contextlib
import importlib
import io
import sys
import types
import unittest
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import attack
import model
import pretrain
from attack import ATTACKS, Attack, pgd
from model import AUTOENCODERS, DEFENSES, NOISE_LAWS, De3, Defense, NoiseLaw, NoiseScale, UserError
from studies import audit, compare, tables
from support import data, tested
from support import run as run_module
from tests.helpers import (REPOSITORY, assert_near, assert_picture, assert_refused, digits_runs, finished,
                           new_folder, photo_autoencoder, photo_classifier, photo_flags, photos,
                           random_images, read_csv, run, seeded)
from tests.helpers import training as short_training


def with_entry(table, **entry):
    """An entry of one of the tables, while it lasts."""
    return mock.patch.dict(table, entry)


def help_of(script):
    """What python SCRIPT.py --help prints, in one line."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        __import__(script).arguments(["--help"])
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
            refused = run("pretrain", "--sigma", "three:10,20,31", "--out", out, "--resume")
            assert_refused(refused, ("three:10,20,30", "three:10,20,31"))
            finished(run("finetune", "--autoencoder", out, "--sigma", "three:0,0,9", *short_training(1, 600)))
            self.assertEqual(run_module.read(out.parent / "de3")["level"], "three:0,0,9")

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


# ------------------------------------------------------------------------------------- denoisers

class Convolution(nn.Module):
    """A denoiser of one layer, with a part that is not trained."""

    def __init__(self, mean, **others):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(mean), len(mean), 3, 3) / 10)
        self.offset = nn.Parameter(torch.full((len(mean), 1, 1), 0.01), requires_grad=False)

    def forward(self, images, noisy):
        return (self.reconstruct(noisy, images) - images).square().mean()

    def reconstruct(self, noisy, reference):
        return F.conv2d(noisy, self.weight, padding=1) + self.offset


class TestAutoencoder(unittest.TestCase):
    def test_through_the_stages(self):
        """pretrain.py --arch trains it; a De³ behind it is trained, shown and attacked as any other."""
        out = new_folder()
        with with_entry(AUTOENCODERS, conv=Convolution):
            importlib.reload(pretrain)  # as in a new process
            self.addCleanup(importlib.reload, pretrain)
            self.assertIn("{vit,conv}", help_of("pretrain"))
            finished(run("pretrain", "--arch", "conv", *photo_flags(), *short_training(3),
                         "--out", out / "nim"))
            finetune = ("finetune", "--autoencoder", out / "nim", *short_training(), "--workers", 0)
            assert_refused(run(*finetune), ("no weights in common", "--from-scratch"))
            finished(run(*finetune, "--from-scratch"))
            finished(run("defend", out / "de3", "--images", 6, "--steps", 1, "--eot", 1))
            finished(run("attack", out / "de3", "--sigma", 50, "--images", 6, "--attack", "pgd+eot",
                         "--steps", 1, "--eps", "8/255"))
            pretraining, whole = run_module.read(out / "nim"), run_module.read(out / "de3")
            defense = run_module.build_whole(whole)
        self.assertEqual((pretraining["config"]["arch"], pretraining["settings"]["arch"]), ("conv", "conv"))
        self.assertEqual(whole["autoencoder"]["config"]["arch"], "conv")
        self.assertIsInstance(defense.autoencoder, Convolution)
        losses = [float(row["loss"]) for row in pretraining["log"]]
        self.assertLess(losses[-1], losses[0])
        assert_near(pretraining["model"]["offset"], torch.full((3, 1, 1), 0.01))  # was not trained
        for name, value in defense.autoencoder.state_dict().items():
            self.assertTrue(torch.equal(value, pretraining["model"][name]))
        row, = read_csv(out / "attack.csv")
        self.assertEqual((row["defense"], row["eot"]), ("de3, σ = 50", "8"))


# --------------------------------------------------------------------------------------- attacks

def momentum(model, images, labels, eps, steps, step_size, norm, restarts, eot, loss, early_stop):
    """The sign of a running mean of gradients, from the image: another attack with pgd's arguments."""
    x, mean = images.clone(), torch.zeros_like(images)
    for _ in range(steps):
        gradient, _ = attack.input_gradient(model, x, labels, loss, eot)
        mean = 0.9 * mean + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
        x = attack.project(x + step_size * mean.sign(), images, eps, norm)
    return x


class TestAttack(unittest.TestCase):
    FLAGS = ("--images", 3, "--eps", 0.1)

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
                entry = tested.Entry("x", "x", "", 50, defense, classifier, defense, {})
                settings = dict(steps=3, step_size=0.01, norm="linf", restarts=1, eot=eot, early_stop=False)
                cell = attack.Cell(entry, defense, True, True, "tried+eot", 0.01, settings, ["ce"], 0)
                args = types.SimpleNamespace(threat="white", norm="linf", seed=0)
                with with_entry(ATTACKS, tried=Attack(function)):
                    shares = attack.measure(cell, args, images, labels, 4, lambda done: None)
                self.assertEqual(sum(calls), 4 * (3 * eot + attack.DRAWS))
                self.assertEqual(shares.shape, (4,))

    def test_eot_in_gray_box(self):
        """Where the classifier, which is all that is differentiated, is random itself; else it is not used."""
        class Noisy(nn.Flatten):
            def forward(self, images):
                return super().forward(images + 0.1 * torch.randn_like(images))
        images = random_images()
        for classifier, needs_eot in ((nn.Flatten(), False), (Noisy(), True)):
            defense = model.NoiseOnly(None, classifier, 50)
            entry = tested.Entry("x", "x", "", 50, defense, classifier, defense, {})
            args = attack.arguments(["runs/x", "--threat", "gray", "--attack", "pgd", "pgd+eot", "--eps", "0.1"])
            cells = attack.plan_table(args, [entry], images, 4)
            self.assertEqual([cell.settings["eot"] for cell in cells], [1, 8] if needs_eot else [1])
            self.assertEqual([(cell.random, cell.needs_eot) for cell in cells], [(True, needs_eot)] * len(cells))
            self.assertFalse(any(cell.settings["early_stop"] for cell in cells))

    def test_own_settings(self):
        """Those of an entry come before the flags'."""
        seen, out = [], new_folder()

        def quick(model, images, labels, eps, **settings):
            seen.append((eps, settings))
            return images
        entry = Attack(quick, lambda eps: dict(steps=2, step_size=eps / 2, extra="x"))
        with with_entry(ATTACKS, quick=entry):
            finished(run("attack", photo_classifier("clean"), "--attack", "quick", *self.FLAGS, "--steps", 9,
                         "--loss", "ce", "margin", "--restarts", 2, "--out", out))
        names = ("steps", "step_size", "extra", "restarts", "loss")
        self.assertEqual([(eps, *[settings[name] for name in names]) for eps, settings in seen],
                         [(0.1, 2, 0.05, "x", 2, loss) for loss in ("ce", "margin")])
        row, = read_csv(out / "attack.csv")
        self.assertEqual((row["attack"], row["steps"], row["step_size"], row["loss"]),
                         ("quick", "2", "0.05", "ce+margin"))

    def test_own_loss(self):
        """A loss that an entry fixes is what it raises, once, whatever --loss says, and stands in the row."""
        seen, out = [], new_folder()

        def quick(model, images, labels, eps, loss, **settings):
            seen.append(loss)
            return images
        with with_entry(ATTACKS, quick=Attack(quick, lambda eps: dict(loss="margin"))):
            finished(run("attack", photo_classifier("clean"), "--attack", "quick", "pgd", *self.FLAGS,
                         "--steps", 1, "--loss", "ce", "margin", "--out", out))
        self.assertEqual(seen, ["margin"])
        self.assertEqual([(row["attack"], row["loss"]) for row in read_csv(out / "attack.csv")],
                         [("quick", "margin"), ("pgd", "ce+margin")])

    def test_norms(self):
        """In a norm that is not its own an attack is refused, before a run is read; with +eot as well."""
        with with_entry(ATTACKS, sparse=Attack(pgd, norms=("l2",))):
            for name in ("sparse", "sparse+eot"):
                refused = run("attack", new_folder(), "--attack", "pgd", name)
                assert_refused(refused, (name, "not bounded in linf"))
            finished(run("attack", photo_classifier("clean"), "--attack", "sparse", "--norm", "l2",
                         *self.FLAGS, "--steps", 1, "--out", new_folder()))

    def test_gradients(self):
        """What an entry says of its gradients is in the time that the table will take at most."""
        entry = tested.Entry("x", "x", "off", None, nn.Flatten(), nn.Flatten(), None, {})
        args = types.SimpleNamespace(eps=[0.1], attack=["pgd", "slow"], threat="white", steps=5,
                                     step_size=None, norm="linf", restarts=2, eot=1, loss=["ce", "margin"])
        with with_entry(ATTACKS, slow=Attack(pgd, gradients=lambda settings: 100 * settings["steps"])):
            plain, slow = attack.plan_table(args, [entry], random_images(), 120)
        self.assertAlmostEqual(slow.seconds / plain.seconds, (100 * 5 * 2) / (5 * 2 * 2))

    def test_leaving_the_ball(self):
        """Any attack is checked."""
        with with_entry(ATTACKS, far=Attack(lambda model, images, *_, **settings: 1 - images)):
            refused = run("attack", photo_classifier("clean"), "--attack", "far", *self.FLAGS, "--out",
                          new_folder())
        assert_refused(refused, "left the ball")

    def test_attack_that_helps(self):
        """More images right under attack than without one: remarked."""
        def helps(model, images, labels, eps, **settings):
            return pgd(model, images, labels, eps, **{**settings, "targets": labels, "early_stop": False})
        clean, out = digits_runs()[0] / "clean", new_folder()
        with with_entry(ATTACKS, helps=Attack(helps)):
            said = finished(run("attack", clean, "--images", 100, "--eps", "8/255", "--steps", 5, "--attack",
                                "helps", "fgsm", "--out", out)).out
        helped, fgsm = read_csv(out / "attack.csv")
        self.assertGreater(float(helped["robust_accuracy"]), float(helped["clean_accuracy"]) + 1)
        self.assertLess(float(fgsm["robust_accuracy"]), float(fgsm["clean_accuracy"]))
        lines = said.splitlines()
        remarks = [number for number, line in enumerate(lines) if "right under attack than without" in line]
        self.assertEqual(["helps" in lines[number - 1] for number in remarks], [True])


# -------------------------------------------------------------------------------------- defenses

class Rounded(Defense):
    """Pixels in so many gray levels; the gradient is that of the identity."""
    title, levels, trained_at = "rounded", (2, 4), "3"

    def __init__(self, autoencoder, classifier, grays, **settings):
        super().__init__(autoencoder, classifier, **settings)
        self.grays = int(grays)

    @property
    def level(self):
        return f"{self.grays} grays"

    def purify(self, images):
        rounded = (images * (self.grays - 1)).round() / (self.grays - 1)
        return rounded.detach() + images - images.detach()


class Vote(De3):
    """De³ that votes."""
    title = "vote"

    def __init__(self, autoencoder, classifier, sigma, **settings):
        super().__init__(autoencoder, classifier, sigma, votes=7, **settings)


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
        """In front of every classifier, at its levels or the one given; a row says the run and the title."""
        finished(run("attack", photo_classifier("clean"), photo_classifier(), *self.FLAGS,
                     "--attack", "fgsm", "--defense", "rounded:3", "off", "rounded", "--out", self.out))
        rows = read_csv(self.out / "attack.csv")
        expected = [(f"{name} behind rounded, {grays} grays" if grays else off, f"{grays} grays" if grays else
                     "off", f"{grays}.0" if grays else "")
                    for name, off in (("clean", "clean"), ("de3", "de3, off")) for grays in (3, None, 2, 4)]
        self.assertEqual([(row["defense"], row["level"], row["value"]) for row in rows], expected)
        self.assertEqual([row["run"] for row in rows],
                         [folder.as_posix() for folder in (photo_classifier("clean"), photo_classifier())
                          for _ in range(4)])
        self.assertEqual({row["draws"] for row in rows}, {"1"})
        self.assertEqual(len({row["weights"] for row in rows}), 8)
        classifier, _ = run_module.load(photo_classifier("clean"), "classifier")
        images, labels, _ = data.load_images(str(photos()), "val", 32, count=6)
        rounded = (data.as_floats(images) * 2).round() / 2
        correct = (classifier(rounded).argmax(1) == labels).float().mean().item()
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

    def test_defend(self):
        """Accuracy, picture, and photographs."""
        source = (photo_classifier("clean"), "--out", self.out, "--defense", "off", "rounded:2")
        result = finished(run("defend", *source, *self.FLAGS, "--steps", 1, "--eot", 2))
        self.assertRegex(result.out, r"clean behind rounded, 2 grays +[\d.]+ \[.*\] +[\d.]+ ")
        assert_picture(self.out / "defend.png")
        result = finished(run("defend", *source, "--photos", photos() / "val" / "red" / "0.png"))
        self.assertRegex(result.out, "clean behind rounded, 2 grays: (red|green|blue)")
        self.assertEqual(len(list((self.out / "purified").iterdir())), 1)

    def test_audit(self):
        with mock.patch.object(audit, "FEWEST_IMAGES", 6), mock.patch.object(audit, "QUERIES", 1):
            result = run("studies.audit", photo_classifier("clean"), "--defense", "off", "rounded:3",
                         *self.FLAGS, "--steps", 1, "--eot", 1, "--draws", 1)
        self.assertIn("audit of clean behind rounded, 3 grays", result.out)
        for check in ("gray-box", "the clamp's own gradient", r"another model \(1\)"):
            self.assertRegex(result.out, rf"(holds|SUSPICIOUS) .*{check}")
        self.assertNotRegex(result.out, "votes|EOT draws")  # nothing is random

    def test_compare(self):
        """In a table of the comparison, by name; a random one without a noise to know."""
        entries = [tables.Entry(name, "clean", "--mode clean", defenses=(f"{name}:3",))
                   for name in ("rounded", "dithered")]
        table = tables.Table({"nim": "pretrain.py"}, entries, images=6, l2=0.0)
        at = photo_classifier("clean").parent
        (at / "nim").symlink_to(photo_autoencoder())
        self.addCleanup((at / "nim").unlink)
        with mock.patch.dict(tables.TABLES, small=table), \
                mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
            finished(run("studies.compare", "small", "--data", photos(), "--at", at, "--steps", 1,
                         "--eot", 3, "--workers", 0))
        rows = read_csv(at / "compare.csv")
        named = [(row["defense"], row["level"]) for row in rows]
        self.assertEqual(named, [("rounded", "3 grays"), ("dithered", "3 grays")])
        self.assertEqual([row["noise_known"] == "" for row in rows], [False, True])
        self.assertEqual({call.kwargs["eot"] for call in attacks.call_args_list
                          if isinstance(call.args[0], Dithered) and "eot" in call.kwargs}, {3})
        self.assertNotEqual(rows[0]["weights"], rows[1]["weights"])

    def test_put_in_front(self):
        """Named by the run, by what is in front of it unless it was trained behind that, and by the level."""
        autoencoder, pretraining = run_module.load(photo_autoencoder("mim"))
        checkpoint = dict(defense="mim")
        found = [tested.put_in_front("runs/x", nn.Flatten(), checkpoint, autoencoder, pretraining, *pair, 3)
                 for pair in (("mim", 0.5), ("mim-visible", "0.5"), ("rounded", "5"), ("off", None))]
        self.assertEqual([(entry.name, entry.level, entry.value) for entry in found],
                         [("x, mask 0.5", "mask 0.5", 0.5),
                          ("x behind MIM, visible kept, mask 0.5", "mask 0.5", 0.5),
                          ("x behind rounded, 5 grays", "5 grays", 5), ("x, off", "off", None)])
        self.assertEqual([entry.defense.votes for entry in found if entry.defense], [3, 3, 3])
        self.assertIs(found[-1].model, found[-1].classifier)
        autoencoder, pretraining = run_module.load(photo_autoencoder("nim"))
        with with_entry(DEFENSES, vote=Vote):  # it is tested as it was made
            own, other = (tested.put_in_front("runs/x", nn.Flatten(), checkpoint, autoencoder, pretraining, "vote",
                                              "50", votes) for votes in (None, 3))
        self.assertEqual((own.defense.votes, other.defense.votes), (7, 3))
        with self.assertRaisesRegex(UserError, "no autoencoder for De³"):
            tested.put_in_front("runs/x", nn.Flatten(), checkpoint, None, None, "de3", "9")
        assert_refused(run("attack", photo_classifier("clean"), "--defense", "square:3"),
                       ("'square'", "rounded"))

    def test_task_of_the_autoencoder(self):
        """NIM's behind masks and MIM's behind noise are refused in every stage, and nothing is begun."""
        nim, mim, out = photo_autoencoder(), photo_autoencoder("mim"), new_folder() / "x"
        de3, behind_mim, clean = photo_classifier(), photo_classifier("mim", "mim"), photo_classifier("clean")
        needs_nim = ("De³ needs an autoencoder", "for NIM", "for MIM")
        needs_mim = ("MIM needs an autoencoder", "for MIM", "for NIM")
        for *command, says in [
                ("finetune", "--mode", "de3", "--autoencoder", mim, needs_nim),
                ("finetune", "--mode", "mim", "--autoencoder", nim, needs_mim),
                ("attack", behind_mim, "--defense", "de3:50", needs_nim),
                ("attack", de3, "--defense", "mim:0.5", needs_mim),
                ("attack", de3, "--autoencoder", mim, needs_nim),
                ("defend", behind_mim, "--autoencoder", nim, needs_mim),
                ("defend", clean, "--autoencoder", mim, "--defense", "de3:50", needs_nim)]:
            with self.subTest(command):
                assert_refused(run(*command, "--out", out), says)
        self.assertFalse(out.exists())
        for task, title in (("nim", "De³"), ("mim", "MIM")):  # in front of what has none: its own defense
            said = finished(run("attack", clean, "--autoencoder", photo_autoencoder(task), *self.FLAGS,
                                "--attack", "fgsm", "--out", out)).out
            self.assertIn(f"clean behind {title}, ", said)

    def test_trained_behind(self):
        """Its name is a --mode: a run is trained behind it, at its trained_at, and tested at its levels."""
        folder = self.out / "rounded"
        finished(run("finetune", "--mode", "rounded", "--autoencoder", photo_autoencoder(), *short_training(),
                     "--workers", 0, "--out", folder))
        checkpoint = run_module.read(folder)
        self.assertEqual([checkpoint[name] for name in ("defense", "level", "autoencoder")],
                         ["rounded", "3", None])
        self.assertIsNone(checkpoint["settings"]["sigma"])
        finished(run("attack", folder, *self.FLAGS, "--attack", "fgsm", "--out", self.out))
        self.assertEqual([(row["defense"], row["level"]) for row in read_csv(self.out / "attack.csv")],
                         [("rounded, 2 grays", "2 grays"), ("rounded, 4 grays", "4 grays")])

    def test_any_module(self):
        """Without this class: the readings and the audit take any model, and find out what is random."""
        class Shaky(nn.Module):
            def forward(self, x):
                return x[:, :, 0, :3].sum(1) + 0.1 * torch.randn(len(x), 3)
        images, labels = random_images(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
        with mock.patch.object(compare, "pgd", wraps=compare.pgd) as attacks:
            found = compare.measure(Shaky(), images, labels, 0.05, 0.5, 5, 4, seed=0, batch=8)
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
                       finetune_sigma="uniform:0,99", test_sigmas=(0, 33), eps=2 / 255, attack_eps=(3 / 255,))


def load_gray_stripes(split, image_size):
    """The same with one channel."""
    colored = load_stripes(split, image_size)
    images, labels = colored.tensors
    dataset = TensorDataset(images[:, :1].contiguous(), labels)
    dataset.classes = colored.classes
    return dataset


class TestDataSet(unittest.TestCase):
    def test_checked_before_training(self):
        """Pixels from 0 to 255 as floats, and labels that are no class numbers."""
        good = load_stripes("train", 32)
        pixels, labels = good.tensors
        for tensors, words in (((255 * pixels, labels), r"must lie in \[0, 1\]"),
                               ((pixels, labels.int()), "class numbers"),
                               ((pixels, labels + 1), "from 0 to 1")):
            dataset = TensorDataset(*tensors)
            dataset.classes = good.classes
            row = STRIPES._replace(open=lambda split, image_size, dataset=dataset: dataset)
            with with_entry(data.DATASETS, stripes=row):
                self.assertRaisesRegex(UserError, words, data.load_images, "stripes", "train", 32)
                self.assertRaisesRegex(UserError, words, data.load_training_images, "stripes", 32, None, 0)

    def test_order_of_classes(self):
        """Validation images take the classifier's."""
        images, labels, names = data.load_images(str(photos()), "val", 32)
        classes = ["red", "green", "blue"]
        reordered = data.load_images(str(photos()), "val", 32, classes)
        self.assertEqual((names, reordered[2]), (["blue", "green", "red"], classes))
        self.assertTrue(torch.equal(reordered[0], images))
        self.assertEqual([classes[label] for label in reordered[1]], [names[label] for label in labels])
        for wrong in (["red", "green"], ["red", "green", "blue", "gray"]):
            with self.assertRaisesRegex(UserError, "classes of .* are not those"):
                data.load_images(str(photos()), "val", 32, wrong)

    def test_through_the_stages(self):
        """Opened, with its own size, statistics, sigmas and radii, where nothing else is said."""
        out = new_folder()
        short = (*short_training(2), "--workers", 0)
        with with_entry(data.DATASETS, stripes=STRIPES):
            finished(run("pretrain", "--data", "stripes", *short, "--out", out / "nim"))
            finished(run("finetune", "--autoencoder", out / "nim", *short))
            defended = finished(run("defend", out / "de3", "--steps", 1, "--eot", 1))
            finished(run("attack", out / "de3", "--attack", "fgsm"))
            assert_refused(run("pretrain", "--data", out / "none"),
                           ", stripes, or a folder")
        checkpoint = run_module.read(out / "de3")
        settings = checkpoint["settings"]
        self.assertEqual((checkpoint["classes"], checkpoint["data"]["name"], settings["size"],
                          settings["sigma"]), (["row", "column"], "stripes", "tiny", "uniform:0,99"))
        self.assertEqual(settings["augmentation"], "None")  # an entry that names none has none
        self.assertEqual(checkpoint["autoencoder"]["settings"]["sigma"], "90")
        model = run_module.build(checkpoint)
        assert_near(torch.cat([model.mean.flatten(), model.std.flatten()]), torch.full((6,), 0.4))
        self.assertIn("20 test images of stripes", defended.out)
        self.assertEqual([(row["level"], row["eps"]) for row in read_csv(out / "attack.csv")],
                         [("σ = 0", "0.0117647"), ("σ = 33", "0.0117647")])
        self.assertEqual({row["data"] for row in read_csv(out / "attack.csv")}, {"stripes"})

    def test_gray(self):
        """One channel, all the way to the pictures: models have as many as the entry's mean has values."""
        out, gray = new_folder(), STRIPES._replace(open=load_gray_stripes, mean=(0.4,), std=(0.4,))
        short = (*short_training(2), "--workers", 0)
        with with_entry(data.DATASETS, gray=gray):
            finished(run("pretrain", "--data", "gray", *short, "--out", out / "nim"))
            for mode in ("de3", "clean"):
                finished(run("finetune", "--mode", mode, "--autoencoder", out / "nim", *short))
            finished(run("defend", out / "clean", out / "de3", "--steps", 1, "--eot", 1))
            finished(run("attack", out / "clean", out / "de3", "--attack", "pgd+eot", "--steps", 2))
        for picture in ("nim/pretrain.png", "defend.png"):
            assert_picture(out / picture)
        self.assertEqual([row["defense"] for row in read_csv(out / "attack.csv")],
                         ["clean", "de3, σ = 0", "de3, σ = 33"])
        self.assertEqual(run_module.load(out / "de3", "classifier")[0].patch_embed.proj.weight.shape[1], 1)


if __name__ == "__main__":
    unittest.main()
