"""A checkpoint is read, built and loaded with care, and knows the code that it was made by."""

import contextlib
import importlib
import io
import math
import pickle
import shutil
import subprocess
import sys
import types
import unittest
from unittest import mock

import torch

from model import De3, UserError, make_classifier
from support import run as run_module
from tests.helpers import (REPOSITORY, RunsCode, assert_near, assert_refused, finished, new_folder,
                           photo_autoencoder, photo_classifier, photo_flags, random_images, read_csv, run,
                           saved, small_autoencoder, small_classifier)

CONFIG = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mean=(0.5,) * 3,
              std=(0.2,) * 3)


def small_checkpoint(kind, **config):
    """A whole checkpoint of a small model, and the model."""
    if kind == "autoencoder":
        config = dict(CONFIG, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, norm_pix=True,
                      **config)
        model = small_autoencoder(**config)
    else:
        config = dict(CONFIG, arch="vit", drop_path=0.1, **{"num_classes": 3, **config})
        torch.manual_seed(0)
        model = make_classifier(**config)
    checkpoint = dict(kind=kind, config=config, settings={}, data=dict(name="digits"), epoch=2, epochs=2,
                      log=[], made_by=[run_module.origin("python x.py", ["model.py"])],
                      model=model.state_dict(), autoencoder=None, defense="", level=None)
    return checkpoint, model


class TestCheckpoint(unittest.TestCase):
    def setUp(self):
        self.folder = new_folder()
        self.path = self.folder / "checkpoint.pt"

    def refused(self, words, kind="autoencoder"):
        """The folder cannot be loaded; one sentence names it and says so in these words."""
        with self.assertRaisesRegex(UserError, words) as refusal:
            run_module.load(self.folder, kind)
        self.assertEqual(len(str(refusal.exception).splitlines()), 1)
        self.assertIn(str(self.folder), str(refusal.exception))

    def test_round_trip(self):
        """The model that was saved, in evaluation mode, frozen; its gradients reach the images."""
        for kind in run_module.MAKERS:
            checkpoint, model = small_checkpoint(kind)
            torch.save(checkpoint, self.path)
            loaded, found = run_module.load(self.folder, kind)
            self.assertEqual(found["config"], checkpoint["config"])
            self.assertEqual(run_module.fingerprint(loaded), run_module.fingerprint(model))
            self.assertFalse(any(module.training for module in loaded.modules()))
            self.assertFalse(any(parameter.requires_grad for parameter in loaded.parameters()))
        autoencoder, _ = run_module.load(photo_autoencoder(), "autoencoder")
        images, trained = random_images(2, 3, 32, 32).requires_grad_(), small_classifier(image_size=32)
        De3(autoencoder, trained, 50)(images).square().sum().backward()
        self.assertGreater(images.grad.abs().sum(), 0)
        self.assertTrue(all(parameter.grad is None for parameter in autoencoder.parameters()))
        self.assertTrue(all(parameter.grad is not None for parameter in trained.parameters()))

    def test_many_classes(self):
        """iNaturalist has ten thousand."""
        checkpoint, model = small_checkpoint("classifier", num_classes=10_001)
        torch.save({**checkpoint, "classes": [f"{number:05}" for number in range(10_001)]}, self.path)
        loaded, _ = run_module.load(self.folder, "classifier")
        self.assertEqual(loaded(random_images()).shape, (4, 10_001))
        self.assertEqual(run_module.fingerprint(loaded), run_module.fingerprint(model))

    def test_code_is_not_run(self):
        """Nor by a stage."""
        checkpoint, _ = small_checkpoint("autoencoder")
        trace = self.folder / "trace"
        for protocol in (None, 2):
            content = {**checkpoint, "model": RunsCode(trace)}
            if protocol is None:
                torch.save(content, self.path)
            else:
                self.path.write_bytes(pickle.dumps(content, protocol))
            self.refused("no checkpoint of this project")
            for stage in (("finetune", "--autoencoder", self.folder), ("defend", self.folder),
                          ("attack", self.folder),
                          ("attack", photo_classifier(), "--autoencoder", self.folder),
                          ("pretrain", "--out", self.folder, "--resume"),
                          ("pretrain", *photo_flags(), "--init", self.folder, "--out", new_folder()),
                          ("studies.ship", self.folder, "--out", new_folder())):
                assert_refused(run(*stage), (self.path, "no checkpoint of this project"))
        self.assertFalse(trace.exists())

    def test_missing(self):
        """A later stage names the one that makes such runs, and of a default run the whole command."""
        for maker, *stage in (("pretrain.py", "finetune", "--autoencoder"), ("finetune.py", "attack"),
                              ("finetune.py", "defend")):
            assert_refused(run(*stage, self.folder), f"make one with python {maker}, or name")
        with contextlib.chdir(self.folder):
            assert_refused(run("attack"), "make one with python finetune.py --mode clean, or")
            assert_refused(run("finetune", "--autoencoder", "runs/digits/mim"), "pretrain.py --task mim, or")

    def test_other_files(self):
        """Truncated, of another kind, or of something else."""
        self.refused(r"holds no run .*python pretrain.py, or")
        self.refused(r"holds no run .*python finetune.py, or", "classifier")
        checkpoint, _ = small_checkpoint("autoencoder")
        torch.save(checkpoint, self.path)
        whole = self.path.read_bytes()
        self.refused("holds autoencoder weights where classifier weights", "classifier")
        torch.save(small_checkpoint("classifier")[0], self.path)  # of no defense: it holds no autoencoder
        self.refused("holds classifier weights where autoencoder weights")
        for content in (whole[:len(whole) // 2], whole[:-30], whole[:10], b"", b"hello"):
            self.path.write_bytes(content)
            self.refused("is damaged")
        for foreign in ({"model": {}}, [1, 2], {"w": torch.zeros(3)}, "x"):
            torch.save(foreign, self.path)
            self.refused("no checkpoint of this project .*studies.convert")

    def test_what_does_not_fit(self):
        """Config and weights must make one model: no other is ever returned."""
        checkpoint, _ = small_checkpoint("autoencoder")
        model, config = checkpoint["model"], checkpoint["config"]
        without = {name: value for name, value in model.items() if name != "cls_token"}
        others = [("config", {**config, name: value}, words) for name, value, words in [
            ("depth", 1, "blocks.1"), ("depth", 3, "blocks.2"), ("embed_dim", 32, "size mismatch"),
            ("num_heads", 3, "3 heads"), ("image_size", 8, "pos_embed"), ("patch_size", 5, "16.* 5"),
            ("dropout", 0.1, "dropout")]]
        others += [("model", {**model, "cls_token": torch.zeros(1, 1, 20)}, "cls_token"),
                   ("model", without, "cls_token"), ("model", {**model, "more": torch.zeros(2)}, "more")]
        for name, value, words in others:
            with self.subTest(words):
                torch.save({**checkpoint, name: value}, self.path)
                with self.assertRaisesRegex((RuntimeError, TypeError, UserError), words):
                    run_module.load(self.folder, "autoencoder")
        held = {**saved(photo_classifier())["autoencoder"], "model": without}
        torch.save({**saved(photo_classifier()), "autoencoder": held}, self.path)
        with self.assertRaisesRegex(RuntimeError, "cls_token"):
            run("attack", self.folder)

    def test_a_defense_holds_its_autoencoder(self):
        """The folder of a De³ gives it as it was saved; that of an undefended run gives none."""
        autoencoder, checkpoint = run_module.load(photo_classifier(), "autoencoder")
        trained, _ = run_module.load(photo_autoencoder(), "autoencoder")
        self.assertEqual((checkpoint["kind"], checkpoint["task"]), ("autoencoder", "nim"))
        self.assertEqual(run_module.fingerprint(autoencoder), run_module.fingerprint(trained))
        for part in (checkpoint, run_module.load(photo_classifier())[1]):
            self.assertNotIn("resume", part)
        with self.assertRaisesRegex(UserError, "holds classifier weights where autoencoder weights"):
            run_module.load(photo_classifier("clean"), "autoencoder")

    def test_architectures(self):
        """Both take [0, 1] images, and normalize them inside."""
        images, config = random_images(), dict(num_classes=7, mean=(0.4,) * 3, std=(0.2,) * 3)
        vit = make_classifier(image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, **config)
        resnet = make_classifier(arch="resnet18", image_size=16, drop_path=0.1, **config).eval()
        self.assertEqual((vit(images).shape, resnet(images).shape), ((4, 7), (4, 7)))
        assert_near(vit.mean.flatten(), torch.full((3,), 0.4))
        assert_near(resnet(images), resnet[1]((images - 0.4) / 0.2), atol=1e-4)

    def test_fingerprint(self):
        """It follows from the weights, and notices the smallest change of one."""
        one, two = (run_module.fingerprint(small_autoencoder(seed)) for seed in (0, 1))
        self.assertRegex(one, "^[0-9a-f]{12}$")
        self.assertEqual(run_module.fingerprint(small_autoencoder(0)), one)
        self.assertEqual(run_module.fingerprint(small_autoencoder(0).eval()), one)
        self.assertNotEqual(one, two)
        changed = small_autoencoder(0)
        weight = changed.decoder_pred.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(math.inf))
        self.assertNotEqual(run_module.fingerprint(changed), one)

    def test_settings_of_all_parts_are_in_the_fingerprint(self):
        """Two defenses of equal weights are two, where a number in any part of them differs."""
        def defense(classifier=None, votes=1, **config):
            return De3(small_autoencoder(0, **config), classifier or small_classifier(), 50, votes=votes)
        plain = run_module.fingerprint(defense())
        self.assertEqual(run_module.fingerprint(defense()), plain)
        otherwise_normalized = defense()
        otherwise_normalized.autoencoder.mean += 0.1
        for other in (defense(norm_pix=True), defense(votes=2), otherwise_normalized, defense(num_heads=4)):
            self.assertNotEqual(run_module.fingerprint(other), plain)
        networks = []
        for mean in (0.4, 0.5):  # in a list, inside torchvision's Normalize
            torch.manual_seed(0)
            networks.append(make_classifier(arch="resnet18", num_classes=3, mean=[mean] * 3, std=[0.2] * 3))
        self.assertNotEqual(*[run_module.fingerprint(defense(network)) for network in networks])


class TestDamage(unittest.TestCase):
    def test_single_bits(self):
        """A flipped bit is noticed, or lies where nothing is read and changes nothing."""
        folder, state = new_folder(), {"w": torch.randn(40, 3), "b": torch.randn(7)}
        path = folder / "checkpoint.pt"
        torch.save({"kind": "autoencoder", "model": state, "epoch": 5}, path)
        whole, refused = path.read_bytes(), 0
        for position in range(0, len(whole), 3):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            try:
                found = run_module.read(folder)
            except UserError as error:
                self.assertEqual(len(str(error).splitlines()), 1, error)
                refused += 1
                continue
            self.assertEqual((list(found), found["epoch"]), (["kind", "model", "epoch"], 5), position)
            for name, value in state.items():
                self.assertTrue(torch.equal(found["model"][name], value), position)
        self.assertGreater(refused, 40 * 3 * 4 / 3)  # at least those in the weights

    def test_every_bit_of_a_number(self):
        folder, weight = new_folder(), torch.tensor([1234.5678])
        path = folder / "checkpoint.pt"
        torch.save({"kind": "classifier", "w": weight}, path)
        whole = path.read_bytes()
        start = whole.index(weight.numpy().tobytes())
        for bit in range(32):
            damaged = bytearray(whole)
            damaged[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            self.assertRaisesRegex(UserError, "checksum", run_module.read, folder)


class TestCode(unittest.TestCase):
    CODE = ('"""Doc."""\nX = 3\n\n\nclass A(B):\n    """Doc."""\n    y = "x"\n\n    def f(self):\n'
            '        return 1\n')

    def digest(self, *changes):
        """Of that code, after this change (what, by what)."""
        return run_module.digest_of_code(self.CODE.replace(*changes) if changes else self.CODE)

    def test_digest(self):
        """Comments, docstrings and layout change nothing; everything else does."""
        whole = self.digest()
        for change in [("Doc.", "Other."), ("X = 3", "X = 3  # three"), ("\n\n\n", "\n\n# a line\n\n\n"),
                       ("X = 3", "X = (3)"), ('"x"', "'x'"), ("    ", "  "), ('    """Doc."""\n', ""),
                       ("f(self):\n", 'f(self):\n        """Doc."""\n')]:
            with self.subTest(change):
                self.assertEqual(self.digest(*change), whole)
        for change in [("X = 3", "X = 4"), ('"x"', '"z"'), ("return 1", "return 1.0"), ("(B)", "(C)"),
                       ("return 1", 'return "Doc."'), ("X = 3", "X = 3; Y = 4"), ("def f", "def g")]:
            with self.subTest(change):
                self.assertNotEqual(self.digest(*change), whole)
        self.assertEqual(run_module.digest_of_file("studies/none.py"), "")

    def git(self, folder, *words):
        """git in this folder; what it prints."""
        return subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=folder,
                              check=True, capture_output=True, text=True).stdout.strip()

    def commit_of(self, folder):
        """The commit of a project that lies in this folder."""
        run_module.commit.cache_clear()
        self.addCleanup(run_module.commit.cache_clear)
        with mock.patch.object(run_module, "REPOSITORY", folder):
            return run_module.commit()

    def project(self, folder):
        """A folder with a file in it by which git knows the project."""
        (folder / "support").mkdir(parents=True)
        (folder / "support/run.py").write_text("1")
        return folder

    def test_commit(self):
        """Of the checkout, with a mark for uncommitted changes; nothing where git knows none."""
        folder = self.project(new_folder() / "project")
        self.assertEqual(self.commit_of(folder), "")
        self.git(folder, "init", "-q")
        self.git(folder, "add", ".")
        self.git(folder, "commit", "-q", "-m", "first")
        commit = self.git(folder, "rev-parse", "HEAD")[:12]
        (folder / "untracked").write_text("2")
        self.assertEqual(self.commit_of(folder), commit)
        (folder / "support/run.py").write_text("2")
        self.assertEqual(self.commit_of(folder), commit + "+")
        with mock.patch("subprocess.run", side_effect=FileNotFoundError):  # no git at all
            self.assertEqual(self.commit_of(folder), "")

    def test_commit_of_a_copy(self):
        """A copy inside somebody's own repository has none: that repository does not know it."""
        outer = new_folder()
        self.git(outer, "init", "-q")
        (outer / "thesis.txt").write_text("1")
        self.git(outer, "add", ".")
        self.git(outer, "commit", "-q", "-m", "mine")
        copy = self.project(outer / "project")
        self.assertEqual(self.commit_of(copy), "")
        self.git(outer, "add", ".")  # now it does
        self.git(outer, "commit", "-q", "-m", "with it")
        self.assertEqual(self.commit_of(copy), self.git(outer, "rev-parse", "HEAD")[:12])

    def test_made_by(self):
        """A run says by which command and code it was made."""
        made, = saved(photo_classifier())["made_by"]
        self.assertEqual((made["from_epoch"], made["commit"]), (1, run_module.commit()))
        self.assertIn("finetune.py --mode de3 --autoencoder", made["command"])
        self.assertEqual(set(made["code"]), {"model.py", "support/training.py", "finetune.py"})
        for name, digest in made["code"].items():
            self.assertEqual(digest, run_module.digest_of_code((REPOSITORY / name).read_text()))

    def test_code_of_a_row(self):
        """A row of attack.csv says which code decides it: the model's and the attack's, no other file's."""
        out, digest_of_file = new_folder(), run_module.digest_of_file
        command = ("attack", photo_classifier("clean"), "--images", 3, "--attack", "fgsm", "--eps", "8/255",
                   "--out", out)
        finished(run(*command))
        first, = read_csv(out / "attack.csv")
        self.assertEqual(first["code"], run_module.digest_of_files(["attack.py", "model.py"]))
        for edited in ("model.py", "attack.py", "support/data.py"):
            def digest(name, edited=edited):
                return "edited" if name == edited else digest_of_file(name)
            with mock.patch.object(run_module, "digest_of_file", digest):
                finished(run(*command))
        codes = {row["code"] for row in read_csv(out / "attack.csv")}
        self.assertEqual(len(codes), 3)

    def test_code_that_was_imported(self):
        """An edit of a file while the process runs changes no digest; importing it anew does."""
        project = new_folder() / "project"
        project.mkdir()
        path, name = project / "edited_module.py", "edited_module.py"
        path.write_text("x = 1\n")
        self.addCleanup(sys.modules.pop, "edited_module", None)
        with mock.patch.object(run_module, "REPOSITORY", project), \
                mock.patch.dict(run_module._imported, clear=True), \
                mock.patch.object(sys, "path", [str(project), *sys.path]), \
                mock.patch.object(sys, "dont_write_bytecode", True):
            module = importlib.import_module("edited_module")
            run_module.note_imported_code()
            first = run_module.digest_of_file(name)
            self.assertEqual(first, run_module.digest_of_code("x = 1"))
            path.write_text("x = 20\n")
            run_module.note_imported_code()  # as every stage does when it begins
            self.assertEqual((module.x, run_module.digest_of_file(name)), (1, first))
            importlib.reload(module)
            run_module.note_imported_code()
            self.assertEqual((module.x, run_module.digest_of_file(name)),
                             (20, run_module.digest_of_code("x = 20")))

    def test_code_of_the_script_that_was_started(self):
        """python attack.py is __main__: an edit while it runs changes no digest either."""
        path = new_folder() / "stage.py"
        path.write_text("x = 1\n")
        started = types.ModuleType("__main__")
        started.__file__ = str(path)
        with mock.patch.object(run_module, "REPOSITORY", path.parent), \
                mock.patch.dict(run_module._imported, clear=True), \
                mock.patch.dict(sys.modules, {"__main__": started}):
            run_module.note_imported_code()
            path.write_text("x = 20\n")
            run_module.note_imported_code()
            self.assertEqual(run_module.digest_of_file("stage.py"), run_module.digest_of_code("x = 1"))

    def test_one_line_for_all_runs(self):
        """Of runs made by other code, or with an autoencoder made by other code, each with its files."""
        def made(by, autoencoder=None):
            digests = {name: run_module.digest_of_file(name) for name in ("model.py", "finetune.py")}
            return dict(made_by=[dict(code={**digests, **code}) for code in by], autoencoder=autoencoder)
        same, edited = made([{}]), made([{}, {"model.py": "other"}])
        checkpoints = {"runs/a": same, "runs/b": edited, "runs/c": made([{}], autoencoder=edited),
                       "runs/d": made([{"model.py": "x", "finetune.py": "y"}])}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run_module.say_made_by_other_code(checkpoints)
            run_module.say_made_by_other_code({"runs/a": same})
        self.assertEqual(printed.getvalue(), "note: made by other code than that of today: runs/b (model.py)"
                         "; runs/c (model.py); runs/d (finetune.py, model.py)\n")

    def test_one_line_a_command(self):
        """attack.py says it once, for all the runs it tests."""
        folders = []
        for mode in ("clean", "de3"):
            folder = shutil.copytree(photo_classifier(mode), new_folder() / mode)
            checkpoint = saved(folder)
            checkpoint["made_by"][0]["code"]["finetune.py"] = "other"
            torch.save(checkpoint, folder / "checkpoint.pt")
            folders.append(folder)
        out = finished(run("attack", *folders, "--images", 3, "--attack", "fgsm", "--sigma", 0, 50, "--out",
                           new_folder())).out
        lines = [line for line in out.splitlines() if "other code" in line]
        self.assertEqual(lines, ["note: made by other code than that of today: "
                                 + "; ".join(f"{folder} (finetune.py)" for folder in folders)])
