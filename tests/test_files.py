"""A folder is begun once, what is saved is what was trained, and tables grow by a line a row."""

import argparse
import contextlib
import copy
import io
import os
import shutil
import unittest
from unittest import mock

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import Normalize

import pretrain
from model import AUTOENCODERS, DEFENSES, De3, UserError
from support import data, report, training
from support import run as run_module
from tests.helpers import (assert_near, assert_refused, assert_same_run, finished, in_processes, new_folder,
                           photo_autoencoder, photo_classifier, photo_flags, process, random_images, read_csv,
                           run, saved, small_autoencoder, small_classifier)
from tests.helpers import training as training_flags

CONFIG = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)


def begun(folder, **flags):
    """A new run of a small classifier in this folder, on four images: (checkpoint, args, the images)."""
    args = argparse.Namespace(**{**dict(out=folder, overwrite=False, resume=False, data="digits", epochs=2,
                                        command="python x.py"), **flags})
    train = TensorDataset(random_images(), torch.zeros(4, dtype=torch.long))
    train.classes = [str(digit) for digit in range(10)]
    checkpoint = run_module.begin(args, "classifier", ["model.py"], CONFIG, data.DATASETS["digits"], train,
                                  defense="", level=None, autoencoder=None)
    return checkpoint, args, train


class TestBegin(unittest.TestCase):
    """Whoever creates checkpoint.pt owns the folder."""

    def test_one_of_several_succeeds(self):
        """Of processes that begin at the same moment, whatever each has seen before."""
        folder = new_folder() / "run"

        def attempt():
            try:
                begun(folder)
            except UserError as refusal:
                words = f"another process has begun a run in {folder}: name another folder with --out"
                os._exit(3 if str(refusal) == words else 4)
        self.assertEqual(sorted(in_processes(attempt, *[() for _ in range(4)])), [0, 3, 3, 3])

    def test_resume_begins_nothing_twice(self):
        """--resume begins where it found nothing; not over what another process has saved since."""
        folder = new_folder() / "run"
        checkpoint, *_ = begun(folder, resume=True)
        begun(folder, resume=True)  # the first has ended before its first save
        run_module.save(folder, checkpoint, small_classifier(), random_images())
        before = (folder / "checkpoint.pt").read_bytes()
        with self.assertRaisesRegex(UserError, "another process has begun a run in"):
            begun(folder, resume=True)
        self.assertEqual((folder / "checkpoint.pt").read_bytes(), before)

    def test_two_starts_at_once(self):
        """One ends well, with a checkpoint that loads; the other is refused."""
        folder = new_folder() / "run"
        starts = [process("pretrain", *training_flags(9), *photo_flags(), "--out", folder) for _ in range(2)]
        for started in starts:
            started.out, started.err = started.communicate(timeout=100)
        refused, ended = sorted(starts, key=lambda started: -started.returncode)
        self.assertEqual((refused.returncode, ended.returncode), (2, 0), (refused.err, ended.err))
        self.assertRegex(refused.err, r"error: (another process has begun a run in|\S+ holds a run)")
        self.assertIn("--out", refused.err)
        run_module.load(folder, "autoencoder")
        self.assertEqual(len(read_csv(folder / "log.csv")), 9)
        self.assertEqual({path.name for path in folder.iterdir()},
                         {"checkpoint.pt", "log.csv", "pretrain.png"})

    def test_overwriting_fails(self):
        """The old run is there until the new one is saved."""
        folder = new_folder() / "run"
        checkpoint, *_ = begun(folder)
        run_module.save(folder, checkpoint, small_classifier(), random_images())
        before = (folder / "checkpoint.pt").read_bytes()
        checkpoint, *_ = begun(folder, overwrite=True)
        with mock.patch("torch.save", side_effect=OSError("no space")), self.assertRaises(UserError):
            run_module.save(folder, checkpoint, small_classifier(), random_images())
        self.assertEqual((folder / "checkpoint.pt").read_bytes(), before)

    def test_unwritable(self):
        """Told before anything is trained."""
        a_file = new_folder() / "file"
        a_file.write_text("in the way")
        with mock.patch.object(training, "EpochLog", side_effect=AssertionError):
            for script, *flags in (["pretrain"], ["finetune", "--mode", "clean", "--from-scratch"]):
                for out, named in ((a_file, a_file), (a_file / "run", a_file), ("/proc/nowhere/run",) * 2):
                    assert_refused(run(script, *flags, "--out", out), str(named).removesuffix("/run"))
        self.assertEqual(a_file.read_text(), "in the way")


class TestKilled(unittest.TestCase):
    def trained_until(self, folder, moment):
        """Train in a forked process, which is gone at this moment: a patch that calls os._exit."""
        def train():
            with moment():
                run("pretrain", *training_flags(2), *photo_flags(), "--out", folder)
        return in_processes(train, ())[0]

    def moments(self):
        """{name: a patch that ends the process there, as a kill does}."""
        torch_save, replace, begin, written = torch.save, os.replace, run_module.begin, []

        def half(number):
            """In the middle of writing the checkpoint for this time (1: that of epoch 0)."""
            def save(content, path):
                written.append(path)
                torch_save(content, path)
                if len(written) == number:
                    os.truncate(path, os.path.getsize(path) // 2)
                    os._exit(9)
            return lambda: mock.patch("torch.save", save)

        def moved(number):
            """After the checkpoint of this time has its name, before log.csv is written."""
            def move(*paths):
                written.append(paths)
                replace(*paths)
                if len(written) == number:
                    os._exit(9)
            return lambda: mock.patch("os.replace", move)

        def created():
            def begin_and_die(*arguments, **more):
                begin(*arguments, **more)
                os._exit(9)
            return mock.patch.object(run_module, "begin", begin_and_die)
        return {"created": created, "half of epoch 0": half(1), "epoch 0": moved(1),
                "half of epoch 1": half(2), "epoch 1": moved(2), "epoch 2": moved(3)}

    def test_at_any_moment(self):
        """What lies there loads, or --resume begins it; in the end the run is the one never killed."""
        whole = new_folder() / "whole"
        finished(run("pretrain", *training_flags(2), *photo_flags(), "--out", whole))
        for name, moment in self.moments().items():
            folder = new_folder() / "run"
            with self.subTest(name):
                self.assertEqual(self.trained_until(folder, moment), 9)
                path = folder / "checkpoint.pt"
                started = path.exists() and path.stat().st_size > 0
                self.assertEqual(started, name not in ("created", "half of epoch 0"))
                if started:
                    run_module.build(run_module.read(folder, "autoencoder"))
                if path.exists():
                    assert_refused(run("pretrain", *training_flags(2), *photo_flags(), "--out", folder),
                                   ("--resume", "--overwrite", "--out"))
                finished(run("pretrain", *training_flags(2), *photo_flags(), "--out", folder, "--resume"))
                assert_same_run(folder, whole)


class TestSave(unittest.TestCase):
    def setUp(self):
        self.folder, self.images = new_folder() / "run", random_images()
        self.path = self.folder / "checkpoint.pt"
        self.checkpoint, self.args, self.train = begun(self.folder)

    def save(self, whole, **parts):
        run_module.save(self.folder, self.checkpoint, whole, self.images, **parts)

    def test_failed(self):
        """A full disk, or Ctrl-C, keeps the old file, and leaves no half one that takes up the room."""
        self.save(small_classifier(seed=1))
        path = self.folder / "checkpoint.pt"
        before = path.read_bytes()

        def write_half(content, target):
            target.write_bytes(before[:1000])
            raise error
        for error, expected in ((OSError("No space left on device"), UserError),
                                (RuntimeError("PytorchStreamWriter failed writing file"), UserError),
                                (KeyboardInterrupt(), KeyboardInterrupt)):
            for patch in (mock.patch("torch.save", write_half), mock.patch("os.replace", side_effect=error)):
                with self.subTest(error=error), patch, \
                        self.assertRaisesRegex(expected, "could not save .*(No space|failed writing)|^$"):
                    self.save(small_classifier(seed=2))
                self.assertEqual((path.read_bytes(), list(self.folder.iterdir())), (before, [path]))

    def test_held_for_a_moment(self):
        """A virus scanner on Windows may hold the file: it is tried again."""
        replace, refusals = os.replace, iter([PermissionError("in use"), PermissionError("in use")])

        def move(*paths):
            for refusal in refusals:
                raise refusal
            replace(*paths)
        with mock.patch("os.replace", move), mock.patch("time.sleep") as pauses:
            self.save(small_classifier())
        self.assertEqual(pauses.call_count, 2)
        run_module.read(self.folder)

    def test_answers_of_the_file(self):
        """Weights in memory that are not those in the file are refused, as soon as they are saved."""
        model, torch_save = small_classifier(), torch.save
        self.save(model)
        run_module.check(self.path, model, self.images)
        for weight in (model.blocks[1].mlp.fc2.weight, model.pos_embed, model.mean):
            with torch.no_grad():
                kept = weight.clone()
                weight += 0.3 * torch.randn_like(weight)
                with self.subTest(list(weight.shape)), self.assertRaisesRegex(
                        UserError, "is not the model that was trained.* differently by up to [0-9.]+"):
                    run_module.check(self.path, model, self.images)
                weight.copy_(kept)

        def save_others(content, path):
            torch_save({**content, "model": small_classifier(seed=9).state_dict()}, path)
        with mock.patch("torch.save", save_others), self.assertRaisesRegex(UserError, "is not the model"):
            self.save(model)
        run_module.check(self.path, model, self.images)  # what was saved before is kept

    def test_answers_that_are_no_numbers(self):
        """Training that diverged in its last step does not replace what was saved before."""
        model = small_classifier()
        self.save(model)
        before = self.path.read_bytes()
        with torch.no_grad():
            model.head.weight.fill_(torch.nan)
        with self.assertRaisesRegex(UserError, "no numbers any more.*lower --base-lr"):
            self.save(model)
        self.assertEqual(self.path.read_bytes(), before)

    def test_in_evaluation_mode(self):
        """Drop path and the like do not count."""
        model = small_classifier(drop_path=0.9)
        model.train()
        self.checkpoint["config"] = {**CONFIG, "drop_path": 0.9}
        self.save(model)
        self.assertFalse(any(part.training for part in model.modules()))

    def test_defense_with_its_autoencoder(self):
        """Its parts are saved as they are now, not as they were read; a random one passes."""
        autoencoder, classifier = small_autoencoder().eval(), small_classifier()
        read = dict(kind="autoencoder", config={**CONFIG, **DECODER}, task="nim", made_by=[], epoch=1,
                    epochs=1, model=copy.deepcopy(autoencoder.state_dict()))
        self.checkpoint.update(defense="de3", level="uniform:0,60", autoencoder=read)
        defense = De3(autoencoder, classifier, "uniform:0,60")
        for _ in range(2):
            self.save(defense)
            held, _ = run_module.load(self.folder, "autoencoder")
            for name, value in autoencoder.state_dict().items():
                self.assertTrue(torch.equal(held.state_dict()[name], value), name)
            with torch.no_grad():
                autoencoder.decoder_pred.weight += 0.1 * torch.randn_like(autoencoder.decoder_pred.weight)
        with self.assertRaisesRegex(UserError, "Give run.save every part that is trained"):
            run_module.check(self.path, defense, self.images)

    def test_average_of_weights(self):
        """It can be what is tested, while --resume goes on with the raw weights and their optimizer."""
        raw, averaged = small_classifier(seed=1), small_classifier(seed=2)
        optimizer = torch.optim.AdamW(raw.parameters(), lr=1e-3)
        raw(self.images).square().sum().backward()
        optimizer.step()
        self.checkpoint["epoch"] = 1
        self.save(averaged, model=raw, optimizer=optimizer)
        tested = run_module.build(run_module.read(self.folder))
        assert_near(tested(self.images), averaged(self.images).detach())

        resumed = small_classifier(seed=3)
        other = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
        with contextlib.redirect_stdout(io.StringIO()):
            run_module.restore(run_module.read(self.folder), self.args, ["model.py"], self.train,
                               model=resumed, optimizer=other)
        for name, value in raw.state_dict().items():
            self.assertTrue(torch.equal(resumed.state_dict()[name], value), name)
        for state, restored in zip(optimizer.state.values(), other.state.values(), strict=True):
            self.assertTrue(torch.equal(state["exp_avg"], restored["exp_avg"]))


class JointDe3(De3):
    """A De³ whose denoiser is trained as well: in training each call changes it."""

    def purify(self, images):
        if self.classifier.training:
            with torch.no_grad():
                self.autoencoder.decoder_pred.bias += 0.02
        return super().purify(images)


class ConvolutionsWithBatchNorm(nn.Module):
    """A small denoiser of another kind, which behaves otherwise in training than in evaluation."""

    def __init__(self, mean, std, **others):
        super().__init__()
        self.layers = nn.Sequential(Normalize(mean, std), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8),
                                    nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))

    def reconstruct(self, noisy, reference):
        return self.layers(noisy)

    def forward(self, images, noisy):
        return (self.layers(noisy) - images).square().mean()


class TestWhatIsTrainedIsSaved(unittest.TestCase):
    """In the stages, modified as users modify them."""

    def test_autoencoder_saved_as_it_was_read(self):
        """Found after the first epoch; saved as it is now, the folder is what was trained."""
        flags = ("finetune", "--autoencoder", photo_autoencoder(), *training_flags(2), "--workers", 0,
                 "--out")
        read, torch_save, folder = saved(photo_autoencoder())["model"], torch.save, new_folder() / "run"

        def save_as_read(content, path):
            torch_save({**content, "autoencoder": {**content["autoencoder"], "model": read}}, path)
        with mock.patch.dict(DEFENSES, de3=JointDe3):
            with mock.patch("torch.save", save_as_read):
                result = run(*flags, new_folder() / "run")
            assert_refused(result, ("is not the model that was trained", "run.save"))
            self.assertEqual(result.out.count("\nepoch "), 1)
            finished(run(*flags, folder))
        held = saved(folder)["autoencoder"]["model"]["decoder_pred.bias"]
        assert_near(held, read["decoder_pred.bias"] + 0.02 * 6, atol=1e-4)  # 6 steps of 8 images

    def test_batch_norm(self):
        """Trained in training mode, compared and shown in evaluation mode, and a De³ can be behind it."""
        nim, de3 = new_folder() / "nim", new_folder() / "de3"
        with mock.patch.dict(AUTOENCODERS, convolutions=ConvolutionsWithBatchNorm), \
                mock.patch.object(pretrain, "TRAINED", ["convolutions"]):
            shown = finished(run("pretrain", "--arch", "convolutions", *training_flags(3), *photo_flags(),
                                 "--out", nim)).out
            again = finished(run("pretrain", "--out", nim, "--resume", "--workers", 0)).out
            finished(run("finetune", "--autoencoder", nim, "--from-scratch", *training_flags(),
                         "--workers", 0, "--out", de3))
        state = saved(nim)["model"]
        self.assertEqual(state["layers.2.num_batches_tracked"], 9)
        self.assertGreater(state["layers.2.running_mean"].abs().max(), 0)
        figures = [out[out.index("PSNR in dB"):] for out in (shown, again)]
        self.assertEqual(*figures)
        kept = saved(de3)["autoencoder"]["model"]
        for name, value in state.items():  # it learns nothing in fine-tuning
            self.assertTrue(torch.equal(kept[name], value), name)


class TestTables(unittest.TestCase):
    def setUp(self):
        self.path = new_folder() / "new" / "table.csv"

    def test_round_trip(self):
        rows = [{"name": "De³, σ = 50", "value": ""}, {"name": 'two\nlines, "quoted"', "value": "1"}]
        self.assertEqual(report.read_rows(self.path), [])
        for row in rows:
            report.append_row(self.path, row)
        report.append_row(self.path, {"name": "last", "value": None})
        self.assertEqual(report.read_rows(self.path), [*rows, {"name": "last", "value": ""}])

    def test_other_columns(self):
        """Refused, and the table left as it is."""
        report.append_row(self.path, {"name": "a", "value": 1})
        before = self.path.read_bytes()
        for row in ({"name": "b"}, {"value": 2, "name": "b"}, {"name": "b", "value": 2, "new": 3}, {"x": 1}):
            with self.assertRaisesRegex(UserError, "other columns: move it away, .* with --out"):
                report.append_row(self.path, row)
        self.assertEqual(self.path.read_bytes(), before)

    def test_spreadsheet(self):
        """With the mark that a spreadsheet program puts in front; columns that a row lacks are empty."""
        self.path.parent.mkdir()
        self.path.write_bytes("\ufeffname,value\nDe³\n".encode())
        self.assertEqual(report.read_rows(self.path), [{"name": "De³", "value": ""}])

    def test_end_of_the_last_line(self):
        """An editor may take it away: the next row still has a line of its own."""
        self.path.parent.mkdir()
        self.path.write_bytes(b"name,value\na,1")
        report.append_row(self.path, {"name": "b", "value": 2})
        self.assertEqual(report.read_rows(self.path),
                         [{"name": "a", "value": "1"}, {"name": "b", "value": "2"}])

    def test_several_append(self):
        """No row is lost."""
        report.append_row(self.path, {"name": "first", "value": 0})

        def append(letter):
            for number in range(15):
                report.append_row(self.path, {"name": letter, "value": number})
        self.assertEqual(in_processes(append, ("a",), ("b",), ("c",)), [0, 0, 0])
        found = [(row["name"], row["value"]) for row in read_csv(self.path)]
        self.assertEqual(sorted(found), sorted([("first", "0")] + [(letter, str(number)) for letter in "abc"
                                                                   for number in range(15)]))

    def test_table_of_attack(self):
        """attack.py refuses one that it cannot add to, in a sentence, and leaves it as it is."""
        folder = new_folder()
        flags = ("attack", photo_classifier("clean"), "--images", 2, "--attack", "fgsm", "--out")
        table = folder / "attack.csv"
        table.write_text("a,b\n1,2\n")
        assert_refused(run(*flags, folder), ("other columns", table))
        self.assertEqual(table.read_text(), "a,b\n1,2\n")
        assert_refused(run(*flags, table), table)  # no folder at all
        shutil.rmtree(folder)
        table.mkdir(parents=True)
        assert_refused(run(*flags, folder), table)
