"""Whatever is changed, no command shows numbers of other code, weights or data as those of today."""

import contextlib
import shutil
import unittest
from unittest import mock

import pretrain
from model import SIZES, Autoencoder
from support import data
from support import run as run_module
from tests.helpers import (REPOSITORY, assert_refused, copy_of_photos, cut_after, elsewhere, finished,
                           new_folder, photo_autoencoder, photo_classifier, photo_flags, photo_runs,
                           photos, read_csv, run, saved, training)

ATTACK = ("--images", 6, "--steps", 2, "--eot", 2, "--eps", "8/255", "--sigma", 0, 50)


def accuracies(table):
    """What a table of attack.py measured."""
    return [(row["defense"], row["attack"], row["clean_accuracy"], row["robust_accuracy"])
            for row in read_csv(table)]


class TestEditedCode(unittest.TestCase):
    def test_edited_statistics(self):
        """Another mean in DATASETS is another setting, although support/data.py is in no digest."""
        flags = ("pretrain", *training(1, 64), "--out", new_folder() / "nim")
        finished(run(*flags))
        edited = data.DATASETS["digits"]._replace(mean=(0.5, 0.5, 0.5))
        with mock.patch.dict(data.DATASETS, digits=edited):
            data.about.cache_clear()  # as in a new process
            assert_refused(run(*flags), ("statistics", "--resume", "--overwrite", "--out"))
        data.about.cache_clear()
        self.assertIn("finished run kept", finished(run(*flags)).out)

    def test_edit_and_rerun(self):
        """A copy of the repository is edited between two starts of the same commands."""
        code, runs = new_folder() / "code", new_folder()
        for name in ("model.py", "pretrain.py", "finetune.py", "attack.py", "support", "tests"):
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            code.mkdir(exist_ok=True)
            copy(REPOSITORY / name, code / name)
        pretrain_, nim = ("pretrain", *photo_flags(), "--out"), runs / "nim"
        finetune_ = ("finetune", "--autoencoder", nim, "--workers", 0, *training(), "--mode")
        attack_ = [("attack", runs / name, "--images", 3, "--steps", 1, "--attack", "pgd", "--sigma", 0,
                    "--eps", "8/255") for name in ("clean", "de3")]
        trained = elsewhere((*pretrain_, nim, *training()), (*finetune_, "clean"), (*finetune_, "de3"),
                            (1, *pretrain_, runs / "part", *training(2)), attack_[0], repository=code)
        self.assertEqual([result.code for result in trained], [0, 0, 0, 130, 0], trained)
        self.assertNotIn("other code", str(trained))
        old, weights = saved(runs / "part")["made_by"][0]["code"], (nim / "checkpoint.pt").read_bytes()

        # comments and docstrings
        text, path = (code / "model.py").read_text(), code / "model.py"
        commented = text.replace('"""Uniform from low to high', '"""Uniform, from LOW to HIGH')
        path.write_text("# edited\n" + commented)
        self.assertNotEqual(commented, text)
        with mock.patch.object(run_module, "REPOSITORY", code):
            kept = run("pretrain", *photo_flags(), *training(), "--out", nim)
            attacked = run(*attack_[0])
        self.assertIn("finished run kept", finished(kept).out)
        self.assertNotIn("other code", kept.out + finished(attacked).out)

        # another noise law, where the uniform one stood
        edited = text.replace(".uniform_(low, high)", ".fill_(low)")
        self.assertNotEqual(edited, text)
        path.write_text(edited)
        refused, clean, attacked, attacked_de3, resumed, anew = elsewhere(
            (*pretrain_, nim, *training()), (*finetune_, "clean"), *attack_,
            ("pretrain", "--out", runs / "part", "--resume"), (*pretrain_, runs / "new", *training()),
            repository=code)
        for result in (refused, clean):
            assert_refused(result, ("made by other code: model.py changed since", "--resume",
                                    "--overwrite", "--out"))
        self.assertEqual((nim / "checkpoint.pt").read_bytes(), weights)
        lines = [line for line in finished(attacked).out.splitlines() if "made by other code" in line]
        self.assertEqual(len(lines), 1)
        self.assertIn(f"{runs / 'clean'} was made by other code (model.py changed since", lines[0])
        self.assertIn(f"{runs / 'de3'} was made by other code", finished(attacked_de3).out)
        self.assertNotIn("other code", finished(anew).out)

        # both codes stand in a run that went on, and in the rows of the table
        self.assertIn("made by other code (model.py changed since", finished(resumed).out)
        first, second = saved(runs / "part")["made_by"]
        self.assertEqual((first["from_epoch"], second["from_epoch"]), (1, 2))
        self.assertEqual(first["code"], old)
        self.assertEqual({name for name in old if second["code"][name] != old[name]}, {"model.py"})
        before, same, after, _ = read_csv(runs / "attack.csv")
        self.assertEqual((before["code"], before["weights"]), (same["code"], same["weights"]))
        self.assertNotEqual(before["code"], after["code"])

    def edited(self, *names):
        """While this lasts, these files seem to have been edited."""
        digest, paths = run_module.digest_of_file, [REPOSITORY / name for name in names]
        edited = mock.Mock(side_effect=lambda path: "edited" if path in paths else digest(path))
        return mock.patch.object(run_module, "digest_of_file", edited)

    def test_which_files(self):
        """The files that decide a run's weights: its own stage, not another."""
        nim, clean = photo_autoencoder(), photo_classifier("clean")
        commands = {nim: ("pretrain", *photo_flags(), *training()),
                    clean: ("finetune", "--mode", "clean", "--autoencoder", nim, *training(2))}
        for name, refused in (("pretrain.py", [nim]), ("finetune.py", [clean]), ("attack.py", []),
                              ("support/training.py", [nim, clean]), ("support/report.py", [])):
            for folder, command in commands.items():
                with self.edited(name):
                    result = run(*command, "--out", folder)
                if folder in refused:
                    assert_refused(result, f"other code: {name} changed since")
                else:
                    self.assertIn("finished run kept", finished(result).out)
        with self.edited("pretrain.py"):  # the autoencoder in a classifier's checkpoint counts
            result = finished(run("attack", photo_classifier(), *ATTACK, "--out", new_folder()))
        self.assertRegex(result.out, r"its autoencoder was made by other code \(pretrain.py changed")

    def test_adversarial_training(self):
        """There the attack decides the weights as well."""
        command = ("finetune", "--adversarial", "8/255", "--autoencoder", photo_runs(), "--workers", 0,
                   *training())
        finished(run(*command))
        with self.edited("attack.py"):
            assert_refused(run(*command), "other code: attack.py changed since")


class TestWeights(unittest.TestCase):
    def test_a_folder_is_a_defense(self):
        """Renamed, copied and alone it gives the same numbers, by whatever code makes models today."""
        original, copies = photo_classifier(), new_folder()
        finished(run("attack", original, *ATTACK, "--out", copies / "first"))
        lonely = copies / "renamed"
        shutil.copytree(original, lonely)
        everything = (photo_autoencoder(), original)
        hidden = [folder.rename(folder.with_name("hidden")) for folder in everything]
        try:
            with mock.patch.dict(SIZES["tiny"], depth=1, embed_dim=8):
                finished(run("attack", lonely, *ATTACK))
                finished(run("defend", photos() / "val/red/0.png", "--run", lonely))
        finally:
            for folder, place in zip(hidden, everything):
                folder.rename(place)
        first, alone = (accuracies(path / "attack.csv") for path in (copies / "first", copies))
        self.assertEqual(alone, first)
        self.assertEqual({row["run"] for row in read_csv(copies / "attack.csv")}, {str(lonely)})
        self.assertEqual([row["weights"] for row in read_csv(copies / "attack.csv")],
                         [row["weights"] for row in read_csv(copies / "first" / "attack.csv")])

    def test_retrained_autoencoder(self):
        """The classifier of the old one is no run of the new one; it keeps its own."""
        nim = photo_runs()
        command = ("finetune", "--autoencoder", nim, "--workers", 0, *training())
        de3 = nim.with_name("de3")
        finished(run(*command))
        finished(run("attack", de3, *ATTACK))
        finished(run("pretrain", "--overwrite", *training(2), *photo_flags(), "--out", nim))
        assert_refused(run(*command), ("autoencoder_weights ", "--resume", "--overwrite", "--out"))
        finished(run("attack", de3, *ATTACK))
        values = accuracies(nim.with_name("attack.csv"))
        self.assertEqual(values[:len(values) // 2], values[len(values) // 2:])
        rows = read_csv(nim.with_name("attack.csv"))
        finished(run("attack", de3, "--autoencoder", nim, *ATTACK))
        with_new = read_csv(nim.with_name("attack.csv"))[len(rows):]
        for old, new in zip(rows[:len(with_new)], with_new, strict=True):
            self.assertEqual(new["defense"], old["defense"])
            self.assertNotEqual(old["weights"], new["weights"])

    def test_code_that_makes_another_model(self):
        """An edited constructor is found when the first epoch is saved, and when a run goes on."""
        folder, flags = new_folder() / "run", (*training(3), *photo_flags())
        def deeper(**config):
            return Autoencoder(**{**config, "depth": 5})
        with mock.patch.object(pretrain, "Autoencoder", deeper):
            result = run("pretrain", *flags, "--out", new_folder() / "run")
            assert_refused(result, ("was saved and cannot be loaded again", "blocks.4"))
            self.assertEqual(result.out.count("epoch "), 1)
        with cut_after(1):
            run("pretrain", *flags, "--out", folder)
        before = (folder / "checkpoint.pt").read_bytes()
        with mock.patch.object(pretrain, "Autoencoder", deeper):
            assert_refused(run("pretrain", "--out", folder, "--resume"),
                           ("does not fit this code", "--overwrite", "--out"))
        self.assertEqual((folder / "checkpoint.pt").read_bytes(), before)

    def test_only_in_out(self):
        """Training writes its files there, and nothing anywhere else."""
        place = new_folder()
        nim = photo_runs()
        existing = {path: path.read_bytes() for path in nim.parent.rglob("*") if path.is_file()}
        images = {path: path.stat().st_mtime_ns for path in photos().rglob("*")}
        with contextlib.chdir(place):
            finished(run("pretrain", *photo_flags(), *training(), "--out", "a/b"))
            for mode, out in (("de3", "c"), ("clean", place / "d")):
                finished(run("finetune", "--mode", mode, "--autoencoder", nim, "--workers", 0,
                             *training(), "--out", out))
            finished(run("finetune", "--out", "c", "--resume"))
            finished(run("pretrain", *photo_flags(), *training(), "--dry-run"))
        found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
        self.assertEqual({name for name in found if "/.lock" not in name},
                         {"a/b/checkpoint.pt", "a/b/log.csv", "a/b/pretrain.png", "c/checkpoint.pt",
                          "c/log.csv", "d/checkpoint.pt", "d/log.csv"})
        self.assertEqual({path: path.read_bytes() for path in nim.parent.rglob("*") if path.is_file()},
                         existing)
        self.assertEqual({path: path.stat().st_mtime_ns for path in photos().rglob("*")}, images)


class TestData(unittest.TestCase):
    def test_two_folders_of_one_name(self):
        """Their runs cannot be taken for each other's, and a test on other images says so."""
        alice, bob = copy_of_photos(), copy_of_photos()
        place = new_folder()
        with contextlib.chdir(place):
            finished(run("pretrain", *photo_flags(alice), *training()))
            nim = place / "runs" / alice.name / "nim"
            assert_refused(run("pretrain", *photo_flags(bob), *training()),
                           (f"data {alice} there, {bob} here", "--overwrite", "--out"))
            self.assertEqual(saved(nim)["settings"]["data"], str(alice))
            finished(run("finetune", "--mode", "clean", "--autoencoder", nim, *training(2),
                         "--workers", 0))
            clean = nim.with_name("clean")
            finished(run("attack", clean, *ATTACK))
            quiet = finished(run("defend", "--run", clean, "--images", 6)).out
            said = [finished(run(*stage, "--data", bob)).out
                    for stage in (("attack", clean, *ATTACK), ("defend", "--run", clean, "--images", 6))]
        self.assertNotIn("was trained on", quiet)
        for out in said:
            self.assertEqual(out.count(f"{clean} was trained on {alice} and is tested on {bob}"), 1)
        rows = read_csv(clean.parent / "attack.csv")
        self.assertEqual([row["data"] for row in rows],
                         [str(folder) for folder in (alice, bob) for _ in range(len(rows) // 2)])

    def test_images_of_a_table(self):
        """attack.csv says by a digest which images were tested, whatever their folder is called."""
        images, clean, out = copy_of_photos(), photo_classifier("clean"), new_folder()
        attack = ("attack", clean, "--data", images, "--attack", "fgsm", "--eps", "8/255", "--out", out)
        finished(run(*attack))
        finished(run(*attack))
        for number in range(1, 8):
            shutil.copy(images / "val/red/0.png", images / f"val/red/{number}.png")
        finished(run(*attack))
        same, again, other = [row["pixels"] for row in read_csv(out / "attack.csv")]
        self.assertEqual(same, again)
        self.assertNotEqual(same, other)

    def test_statistics(self):
        """Of the data set are in the checkpoint: those of today change no old run's numbers."""
        clean, out = photo_classifier("clean"), new_folder()
        finished(run("attack", clean, *ATTACK, "--out", out / "a"))
        row = data.about(str(photos()))._replace(mean=(0.9,) * 3, attack_eps=(1.0,), test_sigmas=(9,))
        with mock.patch.object(data, "about", lambda name: row):
            finished(run("attack", clean, *ATTACK, "--out", out / "b"))
        self.assertEqual(accuracies(out / "a" / "attack.csv"), accuracies(out / "b" / "attack.csv"))
