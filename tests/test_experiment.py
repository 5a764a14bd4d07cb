"""Whatever is changed, no command shows numbers of other code, weights or data as those of today."""

import contextlib
import io
import shutil
import unittest
from pathlib import Path
from unittest import mock

import pretrain
from model import SIZES, Autoencoder
from support import data
from support import run as run_module
from tests.helpers import (REPOSITORY, assert_refused, copy_of_photos, cut_after, elsewhere, finished, new_python,
                           new_folder, photo_autoencoder, photo_classifier, photo_flags, photo_runs,
                           photos, read_csv, run, saved, training)

ATTACK = ("--images", 6, "--steps", 2, "--eot", 2, "--eps", "8/255", "--sigma", 0, 50)
OTHER_CODE = "note: made by other code than that of today: "


def accuracies(table):
    """What a table of attack.py measured."""
    return [(row["level"], row["attack"], row["clean_accuracy"], row["robust_accuracy"])
            for row in read_csv(table)]


def notes_of_code(result):
    """What a stage says of runs that were made by other code: a list of lines."""
    lines = finished(result).out.splitlines()
    return [line.removeprefix(OTHER_CODE) for line in lines if "other code" in line]


def copy_of_the_code():
    """The stages and what they need in another folder, to be edited there."""
    folder = new_folder() / "code"
    folder.mkdir()
    for name in ("model.py", "pretrain.py", "finetune.py", "attack.py"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("support", "tests", "assets/digits"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "assets/digits.npz", folder / "assets")
    return folder


class TestEditedCode(unittest.TestCase):
    def test_edit_and_rerun(self):
        """A copy of the repository is edited between two starts of the same commands."""
        code, runs = copy_of_the_code(), new_folder()
        pretrain_, nim = ("pretrain", *photo_flags(), "--out"), runs / "nim"
        finetune_ = ("finetune", "--autoencoder", nim, "--workers", 0, *training(), "--mode")
        attack_ = [("attack", runs / name, "--images", 3, "--steps", 1, "--attack", "pgd", "--sigma", 0,
                    "--eps", "8/255") for name in ("clean", "de3")]
        trained = elsewhere((*pretrain_, nim, *training()), (*finetune_, "clean"), (*finetune_, "de3"),
                            (1, *pretrain_, runs / "part", *training(2)), attack_[0], repository=code)
        self.assertEqual([result.code for result in trained], [0, 0, 0, 130, 0], trained)
        self.assertNotIn("other code", str(trained))
        old, weights = saved(runs / "part")["made_by"][0]["code"], (nim / "checkpoint.pt").read_bytes()
        self.assertEqual(set(old), {"model.py", "support/training.py", "pretrain.py"})

        # comments and docstrings
        text, path = (code / "model.py").read_text(), code / "model.py"
        commented = text.replace('"""Uniform from low to high', '"""Uniform, from LOW to HIGH')
        path.write_text("# edited\n" + commented)
        self.assertNotEqual(commented, text)
        [attacked] = elsewhere(attack_[0], repository=code)
        self.assertEqual(notes_of_code(attacked), [])
        self.assertRegex(attacked.out, r"clean +8/255 .* kept\n")  # measured by the same code

        # another noise law, where the uniform one stood
        edited = text.replace(".uniform_(low, high)", ".fill_(low)")
        self.assertNotEqual(edited, text)
        path.write_text(edited)
        refused, attacked, attacked_de3, resumed, anew = elsewhere(
            (*pretrain_, nim, *training()), *attack_, ("pretrain", "--out", runs / "part", "--resume"),
            (*pretrain_, runs / "new", *training()), repository=code)
        assert_refused(refused, ("holds a run", "--resume", "--overwrite", "--out"))
        self.assertEqual((nim / "checkpoint.pt").read_bytes(), weights)
        self.assertEqual(notes_of_code(attacked), [f"{runs / 'clean'} (model.py)"])
        self.assertNotIn("kept", attacked.out)
        self.assertEqual(notes_of_code(attacked_de3), [f"{runs / 'de3'} (model.py)"])
        self.assertEqual(notes_of_code(anew), [])

        # both codes stand in a run that went on, and in the rows of the table
        self.assertEqual(notes_of_code(resumed), [f"{runs / 'part'} (model.py)"])
        first, second = saved(runs / "part")["made_by"]
        self.assertEqual((first["from_epoch"], second["from_epoch"]), (1, 2))
        self.assertEqual(first["code"], old)
        self.assertEqual({name for name in old if second["code"][name] != old[name]}, {"model.py"})
        before, after, _ = read_csv(runs / "attack.csv")
        self.assertEqual(before["weights"], after["weights"])
        self.assertNotEqual(before["code"], after["code"])

    def test_edited_while_it_runs(self):
        """A row carries the code that measured it, not what stands in the file since."""
        code, out = copy_of_the_code(), new_folder()
        with mock.patch.object(run_module, "REPOSITORY", code), \
                mock.patch.dict(run_module._imported, clear=True):
            as_it_began = run_module.digest_of_files(["model.py", "attack.py"])
        script = (
            "import attack, importlib\n"
            "from pathlib import Path\n"
            "command = ['assets/digits/clean', '--images', '3', '--attack', 'fgsm', '--eps', '8/255',"
            f" '--device', 'cpu', '--out', {str(out)!r}]\n"
            "attack.main(command)\n"
            "path = Path('attack.py')\n"
            "path.write_text(path.read_text().replace('DRAWS = 5', 'DRAWS = 1'))\n"
            "attack.main(command)\n"
            "attack = importlib.reload(attack)\n"
            "attack.main(command)\n")
        printed = new_python(script, code)
        self.assertEqual([line.split()[-1] == "kept" for line in printed.splitlines()
                          if line.startswith("clean ")], [False, True, False])
        before, after = read_csv(out / "attack.csv")
        self.assertEqual(before["code"], as_it_began)
        self.assertNotEqual(after["code"], as_it_began)

    def edited(self, *names):
        """While this lasts, these files seem to have been edited."""
        digest = run_module.digest_of_file
        return mock.patch.object(run_module, "digest_of_file",
                                 lambda name: "edited" if name in names else digest(name))

    def test_which_files(self):
        """The files that decide a run's weights, and its autoencoder's: its own stage, not another."""
        nim, clean, de3 = photo_autoencoder(), photo_classifier("clean"), photo_classifier()
        attack = ("attack", clean, de3, "--images", 3, "--attack", "fgsm", "--eps", "8/255", "--sigma", 0)
        for name, expected in (("pretrain.py", [de3]), ("finetune.py", [clean, de3]), ("attack.py", []),
                               ("support/training.py", [clean, de3]), ("support/report.py", [])):
            with self.subTest(name), self.edited(name):
                notes = notes_of_code(run(*attack, "--out", new_folder()))
                line = "; ".join(f"{folder} ({name})" for folder in expected)
                self.assertEqual(notes, [line] if expected else [])
        for name, expected in (("pretrain.py", [f"{nim} (pretrain.py)"]), ("finetune.py", [])):
            with self.subTest(name), self.edited(name):
                finetuned = run("finetune", "--autoencoder", nim, "--workers", 0, *training(), "--out",
                                new_folder() / "run")
                self.assertEqual(notes_of_code(finetuned), expected)

    def test_adversarial_training(self):
        """There the attack decides the weights as well."""
        folder = new_folder() / "run"
        finished(run("finetune", "--adversarial", "8/255", "--autoencoder", photo_autoencoder(),
                     "--workers", 0, *training(), "--out", folder))
        with self.edited("attack.py"):
            notes = notes_of_code(run("attack", folder, *ATTACK, "--out", new_folder()))
        self.assertEqual(notes, [f"{folder} (attack.py)"])


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
                finished(run("defend", lonely, "--photos", photos() / "val/red/0.png"))
        finally:
            for folder, place in zip(hidden, everything):
                folder.rename(place)
        first, alone = (accuracies(path / "attack.csv") for path in (copies / "first", copies))
        self.assertEqual(alone, first)
        self.assertEqual({row["run"] for row in read_csv(copies / "attack.csv")}, {lonely.as_posix()})
        self.assertEqual(read_csv(copies / "attack.csv")[0]["defense"], "renamed, σ = 0")
        self.assertEqual([row["weights"] for row in read_csv(copies / "attack.csv")],
                         [row["weights"] for row in read_csv(copies / "first" / "attack.csv")])

    def test_retrained_autoencoder(self):
        """The classifier of the old one is no run of the new one; it keeps its own."""
        nim = photo_runs()
        command = ("finetune", "--autoencoder", nim, "--workers", 0, *training())
        de3, out = nim.with_name("de3"), new_folder()
        finished(run(*command))
        finished(run("attack", de3, *ATTACK, "--out", out / "before"))
        finished(run("pretrain", "--overwrite", *training(2), *photo_flags(), "--out", nim))
        assert_refused(run(*command), ("holds a run", "--resume", "--overwrite", "--out"))
        finished(run("attack", de3, *ATTACK, "--out", out / "after"))
        self.assertEqual(accuracies(out / "before/attack.csv"), accuracies(out / "after/attack.csv"))
        rows = read_csv(out / "after/attack.csv")
        finished(run("attack", de3, "--autoencoder", nim, *ATTACK, "--out", out / "after"))
        with_new = read_csv(out / "after/attack.csv")[len(rows):]
        for old, new in zip(rows, with_new, strict=True):
            self.assertEqual((new["defense"], new["attack"]),
                             (f"{old['defense']}, autoencoder of nim", old["attack"]))
            self.assertNotEqual(old["weights"], new["weights"])

    def test_code_that_makes_another_model(self):
        """An edited constructor is found before the first epoch, and when a run goes on."""
        folder, flags = new_folder() / "run", (*training(3), *photo_flags())

        def deeper(arch="vit", **config):
            return Autoencoder(**{**config, "depth": 5})
        with mock.patch.object(pretrain, "make_autoencoder", deeper), \
                self.assertRaisesRegex(RuntimeError, "blocks.4"):
            run("pretrain", *flags, "--out", new_folder() / "run")
        with cut_after(1):
            run("pretrain", *flags, "--out", folder)
        before = (folder / "checkpoint.pt").read_bytes()
        with mock.patch.object(pretrain, "make_autoencoder", deeper), \
                self.assertRaisesRegex(RuntimeError, "blocks.4"):
            run("pretrain", "--out", folder, "--resume")
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
        found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
        self.assertEqual(found, {"a/b/checkpoint.pt", "a/b/log.csv", "a/b/pretrain.png", "c/checkpoint.pt",
                                 "c/log.csv", "d/checkpoint.pt", "d/log.csv"})
        self.assertEqual({path: path.read_bytes() for path in nim.parent.rglob("*") if path.is_file()},
                         existing)
        self.assertEqual({path: path.stat().st_mtime_ns for path in photos().rglob("*")}, images)


class TestData(unittest.TestCase):
    def test_two_folders_of_one_name(self):
        """Their runs cannot be taken for each other's, and a test on other images says so."""
        alice, bob = copy_of_photos(), copy_of_photos()
        for number in range(1, 8):
            shutil.copy(bob / "val/red/0.png", bob / f"val/red/{number}.png")
        place = new_folder()
        with contextlib.chdir(place):
            finished(run("pretrain", *photo_flags(alice), *training()))
            nim = place / "runs" / alice.name / "nim"
            assert_refused(run("pretrain", *photo_flags(bob), *training()),
                           ("holds a run", "--overwrite", "--out"))
            self.assertEqual(saved(nim)["settings"]["data"], str(alice))
            finished(run("finetune", "--mode", "clean", "--autoencoder", nim, *training(2),
                         "--workers", 0))
            clean = nim.with_name("clean")
            finished(run("attack", clean, *ATTACK))
            quiet = finished(run("defend", clean, "--images", 6)).out
            said = [finished(run(*stage, "--data", bob)).out
                    for stage in (("attack", clean, *ATTACK), ("defend", clean, "--images", 6))]
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
        renamed = Path(shutil.copytree(images, new_folder() / "renamed"))
        finished(run("attack", clean, "--data", renamed, *attack[4:-1], new_folder() / "other"))
        for number in range(1, 8):
            shutil.copy(images / "val/red/0.png", images / f"val/red/{number}.png")
        finished(run(*attack))
        first, other = [row["pixels"] for row in read_csv(out / "attack.csv")]
        self.assertNotEqual(first, other)

    def test_statistics(self):
        """Of the data set are in the checkpoint: those of today change no old run's numbers."""
        clean, out = photo_classifier("clean"), new_folder()
        finished(run("attack", clean, *ATTACK, "--out", out / "a"))
        with contextlib.redirect_stdout(io.StringIO()):
            row = data.about(str(photos()))
        row = row._replace(mean=(0.9,) * 3, attack_eps=(1.0,), test_sigmas=(9,))
        with mock.patch.object(data, "about", lambda *about: row):
            finished(run("attack", clean, *ATTACK, "--out", out / "b"))
        self.assertEqual(accuracies(out / "a" / "attack.csv"), accuracies(out / "b" / "attack.csv"))
