"""Results are written whole, tables are read with care, and locks keep two processes apart."""

import multiprocessing
import os
import signal
import stat
import unittest
from unittest import mock

from model import UserError
from support import evaluation, files, runs, training
from tests.helpers import (assert_refused, digits_names, digits_runs, in_processes, new_folder,
                           read_csv, run)

FIELDS = ("name", "value")


class TestWriteWhole(unittest.TestCase):
    def test_two_writers_at_once(self):
        """One of the two files is there in the end, whole, and nothing else."""
        path = new_folder() / "run" / "checkpoint.pt"

        def write(letter):
            for _ in range(20):
                files.write_whole(path, lambda file: file.write(letter * 10**6))
        self.assertEqual(in_processes(write, (b"a",), (b"b",)), [0, 0])
        self.assertIn(path.read_bytes(), (b"a" * 10**6, b"b" * 10**6))
        self.assertEqual(list(path.parent.iterdir()), [path])

    def test_interrupted(self):
        """Ctrl-C keeps the old file, and leaves no half one."""
        path = new_folder() / "log.csv"
        path.write_text("old")
        with mock.patch("os.fsync", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt):
                files.write_whole(path, lambda file: file.write(b"new"))
        self.assertEqual((path.read_text(), list(path.parent.iterdir())), ("old", [path]))

    def test_reaches_the_disk(self):
        """The file is flushed, and then the folder with its new name."""
        flushed, fsync = [], os.fsync

        def noted(descriptor):
            flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
            fsync(descriptor)
        with mock.patch("os.fsync", noted):
            files.write_whole(new_folder() / "file", lambda file: file.write(b"new"))
        self.assertEqual(flushed, [False, True])

    def test_others_may_read_it(self):
        """As any file that is written here: the temporary name does not make it private."""
        folder = new_folder()
        files.write_whole(folder / "result", lambda file: file.write(b"1"))
        (folder / "plain").write_bytes(b"1")
        self.assertEqual((folder / "result").stat().st_mode, (folder / "plain").stat().st_mode)


class TestTables(unittest.TestCase):
    def setUp(self):
        self.path = new_folder() / "new" / "table.csv"

    def test_round_trip(self):
        rows = [{"name": "De³, σ = 50", "value": ""}, {"name": 'two\nlines, "quoted"', "value": "1"}]
        self.assertEqual(files.read_table(self.path, FIELDS), [])
        files.write_table(self.path, FIELDS, rows)
        self.assertEqual(files.read_table(self.path, FIELDS), rows)
        files.append_row(self.path, FIELDS, {"name": "last"})
        self.assertEqual(files.read_table(self.path, FIELDS), [*rows, {"name": "last", "value": ""}])

    def test_last_line_without_its_end(self):
        files.write_whole(self.path, lambda file: file.write(b"name,value\na,1\nb,2"))
        files.append_row(self.path, FIELDS, {"name": "c", "value": "3"})
        self.assertEqual(self.path.read_text().splitlines(), ["name,value", "a,1", "b,2", "c,3"])

    def test_damaged(self):
        """Refused, with the line, and left as it is."""
        for content, words in [(b"a,b\n1,2\n", "not a table of name ... value"),
                               (b"name,value\na,1\nb\n", "line 3"), (b"name,value\na,1\nb", "line 3"),
                               (b"name,value\na,1,2\nb,1\n", "line 2"),
                               (b"name,value\na,1\n\xff,1\n", "near line 2 .*repair"),
                               (b"\xff\xfe", "damaged .*utf-8"),
                               (b'name,value\na,"1\nb,2\n', "near line 3 .*repair")]:
            with self.subTest(content):
                files.write_whole(self.path, lambda file: file.write(content))
                for act in (files.read_table, files.append_row):
                    with self.assertRaisesRegex(UserError, words) as refusal:
                        act(self.path, FIELDS, *([{}] if act is files.append_row else []))
                    self.assertEqual(len(str(refusal.exception).splitlines()), 1)
                self.assertEqual(self.path.read_bytes(), content)

    def test_several_append(self):
        """No row is lost."""
        def append(letter):
            for number in range(15):
                files.append_row(self.path, FIELDS, {"name": letter, "value": number})
        self.assertEqual(in_processes(append, ("a",), ("b",), ("c",)), [0, 0, 0])
        found = {(row["name"], row["value"]) for row in read_csv(self.path)}
        self.assertEqual(found, {(letter, str(number)) for letter in "abc" for number in range(15)})

    def test_log(self):
        """A log of other columns, or with a damaged row, is named and kept; before the training."""
        folder, flags = new_folder(), ("--epochs", 2, "--warmup-epochs", 1, "--runs")
        log = folder / "digits" / "nim_gamma10-12" / "log.csv"
        no_training = mock.patch.object(training, "EpochLog", side_effect=AssertionError)
        for content in ("epoch,loss\n1,2\n", ",".join(runs.LOG_FIELDS) + "\n1,0.5\n"):
            files.write_whole(log, lambda file: file.write(content.encode()))
            with no_training:
                assert_refused(run("pretrain", *flags, folder), log)
            files.write_whole(self.path, lambda file: file.write(content.encode()))
            with self.assertRaisesRegex(UserError, str(self.path)):
                training.write_log_row(self.path, {"epoch": 2})
            self.assertEqual(self.path.read_text(), content)

    def test_attack_table_is_checked_first(self):
        """Before a single gradient is computed."""
        made, *_ = digits_runs()
        classifier = made / "digits" / digits_names()[0]
        flags = ("--classifier", classifier, "--sigma", 0, "--images", 2, "--steps", 1, "--runs")
        folder, no_attack = new_folder(), mock.patch("attack.pgd", side_effect=AssertionError)
        (folder / "digits").mkdir()
        table = folder / "digits" / "attack.csv"
        table.write_text(",".join(evaluation.FIELDS) + "\nDe³,1\n", encoding="utf-8")
        with no_attack:
            assert_refused(run("attack", *flags, folder), ("line 2", table))
            table.write_text("a,b\n")
            assert_refused(run("attack", *flags, folder), ("not a table", table))
            assert_refused(run("attack", *flags, table), (table, "--runs"))  # no folder at all


class TestLocks(unittest.TestCase):
    def hold(self, folder):
        """In a process of its own: exit code 3 where another has the folder."""
        def attempt():
            try:
                files.hold_folder(folder)
            except UserError as refusal:
                sentence = f"another process is training in {folder}: "
                os._exit(3 if str(refusal).startswith(sentence) else 4)
        return in_processes(attempt, ())[0]

    def test_one_process_at_a_time(self):
        """The same process may train twice in a folder."""
        folder = new_folder() / "run"
        self.assertEqual(self.hold(folder), 0)
        files.hold_folder(folder)
        files.hold_folder(folder)
        self.assertEqual(self.hold(folder), 3)
        self.assertEqual(self.hold(new_folder()), 0)

    def test_killed(self):
        """Its lock is free at once, also while a process that it started (to load images) lives on."""
        folder, fork = new_folder(), multiprocessing.get_context("fork")
        ready, loader = fork.Event(), fork.Value("i")

        def train():
            files.hold_folder(folder)
            number = os.fork()
            if number:  # not in the loading process
                loader.value = number
                ready.set()
            signal.pause()
        running = fork.Process(target=train)
        running.start()
        self.assertTrue(ready.wait(30))
        self.assertEqual(self.hold(folder), 3)
        running.kill()
        running.join()
        self.assertEqual(self.hold(folder), 0)
        os.kill(loader.value, signal.SIGKILL)

    def test_without_locks(self):
        """Windows has none; nothing else changes."""
        folder = new_folder() / "run"
        with mock.patch.object(files, "fcntl", None):
            files.hold_folder(folder)
            files.append_row(folder / "table.csv", FIELDS, {"name": "a"})
        self.assertEqual(self.hold(folder), 0)

    def test_leftovers(self):
        """Half files of killed runs are removed, others are not touched."""
        folder = new_folder()
        for name in (".checkpoint.pt.0123.tmp", "checkpoint.pt", ".hidden", "x.tmp"):
            (folder / name).write_bytes(b"half")
        files.hold_folder(folder)
        kept = sorted(path.name for path in folder.iterdir())
        self.assertEqual(kept, [".hidden", ".lock", "checkpoint.pt", "x.tmp"])

    def test_unwritable(self):
        """Told before anything is trained."""
        no_training = mock.patch.object(training, "EpochLog", side_effect=AssertionError)
        a_file = new_folder() / "file"
        a_file.write_text("in the way")
        with no_training:
            for script, *flags in (["pretrain"], ["finetune", "--mode", "clean", "--from-scratch"]):
                assert_refused(run(script, *flags, "--runs", a_file), (a_file, "choose another --runs"))
