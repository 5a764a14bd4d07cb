"""Results are written whole, tables are read with care, and locks keep two processes apart."""

import multiprocessing
import os
import signal
import unittest
from unittest import mock

from model import UserError
from support import report, training
from support import run as run_module
from tests.helpers import (assert_refused, finished, in_processes, new_folder, photo_classifier,
                           photo_flags, read_csv, run)
from tests.helpers import training as training_flags


class TestWriteWhole(unittest.TestCase):
    def test_two_writers_at_once(self):
        """One of the two files is there in the end, whole, and nothing else."""
        path = new_folder() / "run" / "checkpoint.pt"

        def write(letter):
            for _ in range(20):
                run_module.write_whole(path, lambda file: file.write(letter * 10**6))
        self.assertEqual(in_processes(write, (b"a",), (b"b",)), [0, 0])
        self.assertIn(path.read_bytes(), (b"a" * 10**6, b"b" * 10**6))
        self.assertEqual(list(path.parent.iterdir()), [path])

    def test_failed(self):
        """A full disk, or Ctrl-C, keeps the old file, and leaves no half one that takes up the room."""
        path = new_folder() / "log.csv"
        path.write_text("old")
        for error, expected in ((OSError("No space left on device"), UserError),
                                (KeyboardInterrupt(), KeyboardInterrupt)):
            for step in ("os.replace", "pathlib.Path.write_bytes"):
                with self.subTest(step, error=error), mock.patch(step, side_effect=error), \
                        self.assertRaisesRegex(expected, "No space left|^$"):
                    run_module.write_whole(path, lambda file: file.write(b"new"))
                self.assertEqual((path.read_text(), list(path.parent.iterdir())), ("old", [path]))
        run_module.write_whole(path, lambda file: file.write(b"new"))
        self.assertEqual(path.read_text(), "new")

    def test_others_may_read_it(self):
        """As any file that is written here: the temporary name does not make it private."""
        folder = new_folder()
        run_module.write_whole(folder / "result", lambda file: file.write(b"1"))
        (folder / "plain").write_bytes(b"1")
        self.assertEqual((folder / "result").stat().st_mode, (folder / "plain").stat().st_mode)


class TestTables(unittest.TestCase):
    def setUp(self):
        self.path = new_folder() / "new" / "table.csv"

    def write(self, content):
        run_module.write_whole(self.path, lambda file: file.write(content))

    def test_round_trip(self):
        rows = [{"name": "De³, σ = 50", "value": ""}, {"name": 'two\nlines, "quoted"', "value": "1"}]
        self.assertEqual(report.read_table(self.path), [])
        report.write_table(self.path, ["name", "value"], rows)
        self.assertEqual(report.read_table(self.path, numbers=["value"]), rows)
        report.append_row(self.path, {"name": "last"})
        self.assertEqual(report.read_table(self.path), [*rows, {"name": "last", "value": ""}])

    def test_other_columns(self):
        """A new one stands behind the old ones, empty in old rows; an old one stays."""
        self.write(b"name,old\na,1\nb,2")  # without the end of its last line
        report.append_row(self.path, {"new": "x", "name": "c"})
        report.append_row(self.path, {"name": "d", "old": 4})
        self.assertEqual(self.path.read_text().splitlines(),
                         ["name,old,new", "a,1,", "b,2,", "c,,x", "d,4,"])

    def test_spreadsheet(self):
        """With the mark that a spreadsheet program puts in front; columns that a row lacks are empty."""
        self.write("\ufeffname,value\nDe³\n".encode())
        self.assertEqual(report.read_table(self.path, numbers=["value"]), [{"name": "De³", "value": ""}])

    def test_damaged(self):
        """Refused, and left as it is."""
        for content in (b"name;value\na;1\n", b"name,value\na,1,2\nb,1\n", b'name,value\na,"1\nb,2\n',
                        b"\xff\xfe", b"\x00\x01\x02"):
            with self.subTest(content):
                self.write(content)
                for act in (report.read_table, lambda path: report.append_row(path, {"name": "c"})):
                    with self.assertRaisesRegex(UserError, "repair it, or move it away") as refusal:
                        act(self.path)
                    self.assertEqual(len(str(refusal.exception).splitlines()), 1)
                self.assertEqual(self.path.read_bytes(), content)
        self.write(b"name,value\na,1\nb,much\n")
        with self.assertRaisesRegex(UserError, "much"):
            report.read_table(self.path, numbers=["value"])

    def test_several_append(self):
        """No row is lost."""
        def append(letter):
            for number in range(15):
                report.append_row(self.path, {"name": letter, "value": number})
        self.assertEqual(in_processes(append, ("a",), ("b",), ("c",)), [0, 0, 0])
        found = {(row["name"], row["value"]) for row in read_csv(self.path)}
        self.assertEqual(found, {(letter, str(number)) for letter in "abc" for number in range(15)})

    def test_attack_table_is_checked_first(self):
        """Before a single gradient is computed."""
        flags = ("attack", photo_classifier("clean"), "--images", 2, "--steps", 1, "--out")
        folder = new_folder()
        table = folder / "attack.csv"
        with mock.patch("attack.attack_batches", side_effect=AssertionError):
            table.write_text("a,b\n1,2,3\n")
            assert_refused(run(*flags, folder), ("more fields", table))
            assert_refused(run(*flags, table), table)  # no folder at all
            table.unlink()
            table.mkdir()
            assert_refused(run(*flags, folder), table)


class TestLocks(unittest.TestCase):
    def take(self, folder, wait=False):
        """In a process of its own: exit code 3 where another has the folder."""
        def attempt():
            try:
                run_module.take_lock(folder / ".lock", wait)
            except UserError as refusal:
                sentence = f"another process is training in {folder}: "
                os._exit(3 if str(refusal).startswith(sentence) else 4)
        return in_processes(attempt, ())[0]

    def test_one_process_at_a_time(self):
        """The same process may train twice in a folder."""
        folder = new_folder() / "run"
        self.assertEqual(self.take(folder), 0)
        locks = [run_module.take_lock(folder / ".lock", wait=False) for _ in range(2)]
        self.assertEqual(self.take(folder), 3)
        self.assertEqual(self.take(new_folder()), 0)
        for lock in locks:
            lock.close()
        self.assertEqual(self.take(folder), 0)

    def test_killed(self):
        """Its lock is free at once, also while a process that it started (to load images) lives on."""
        folder, fork = new_folder(), multiprocessing.get_context("fork")
        ready, loader = fork.Event(), fork.Value("i")

        def train():
            lock = run_module.take_lock(folder / ".lock", wait=False)
            number = os.fork()
            if number:  # not in the loading process
                loader.value = number
                ready.set()
            signal.pause()
            lock.close()
        running = fork.Process(target=train)
        running.start()
        self.addCleanup(running.kill)
        self.assertTrue(ready.wait(30))
        self.addCleanup(os.kill, loader.value, signal.SIGKILL)
        self.assertEqual(self.take(folder), 3)
        running.kill()
        running.join()
        self.assertEqual(self.take(folder), 0)

    def test_without_locks(self):
        """Windows has none; nothing else changes."""
        folder = new_folder() / "run"
        with mock.patch.object(run_module, "fcntl", None):
            run_module.take_lock(folder / ".lock", wait=False).close()
            report.append_row(folder / "table.csv", {"name": "a", "value": 1})
            finished(run("pretrain", *training_flags(), *photo_flags(), "--out", folder))
        self.assertEqual(read_csv(folder / "table.csv"), [{"name": "a", "value": "1"}])

    def test_unwritable(self):
        """Told before anything is trained."""
        a_file = new_folder() / "file"
        a_file.write_text("in the way")
        with mock.patch.object(training, "EpochLog", side_effect=AssertionError):
            for script, *flags in (["pretrain"], ["finetune", "--mode", "clean", "--from-scratch"]):
                for out in (a_file, a_file / "run", "/proc/nowhere/run"):
                    assert_refused(run(script, *flags, "--out", out), (out, "choose another --out"))
