"""Images that are loaded by other processes, and what may go wrong with the machine."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

import numpy as np
import torch
from PIL import Image

import finetune
from model import UserError
from support import checkpoints, cli, data
from tests.helpers import (REPOSITORY, assert_refused, copy_of_photos, finished, new_folder,
                           photo_flags, photo_runs, photos, run, training)


class TestLoading(unittest.TestCase):
    def test_workers_do_not_matter(self):
        """Exact resume: begun with two processes that load and augment, ended with none."""
        whole_runs, cut_runs = photo_runs()[0], photo_runs()[0]
        flags, save, calls = ("--mode", "de3", *training(3)), checkpoints.save_checkpoint, []

        def cut_short(*arguments):
            save(*arguments)
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
        with mock.patch.object(finetune, "AUGMENT_FROM", 1), mock.patch.object(data, "MEMORY", 0):
            whole, = finished(run("finetune", *flags, *photo_flags(whole_runs))).wrote()
            with mock.patch.object(checkpoints, "save_checkpoint", cut_short):
                cut = run("finetune", *flags, *photo_flags(cut_runs), "--workers", 2)
            self.assertEqual(cut.code, 130)
            path, = finished(run("finetune", *flags, *photo_flags(cut_runs), "--resume")).wrote()
        whole, resumed = torch.load(whole)["model"], torch.load(path)["model"]
        for name, value in whole.items():
            self.assertTrue(torch.equal(value, resumed[name]), name)

    def test_augmentation(self):
        """Of an image differs from epoch to epoch and from seed to seed, and repeats."""
        with mock.patch.object(data, "MEMORY", 0):
            dataset = data.load_dataset(str(photos()), "train", 32, lambda image: torch.rand(3))
        drawn = {key: dataset[key][0] for key in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2))}
        self.assertEqual(len({tuple(values.tolist()) for values in drawn.values()}), 4)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        for key, values in drawn.items():
            self.assertTrue(torch.equal(dataset[key][0], values))
        self.assertTrue(torch.equal(torch.get_rng_state(), before))  # nobody else's numbers are used

    def test_killed_worker(self):
        """One sentence, whatever the process was doing."""
        def die(path):
            os.kill(os.getpid(), signal.SIGKILL)
        flags = (*training(2), *photo_flags(new_folder())[:-4], "--runs", new_folder(), "--workers", 1)
        with mock.patch.object(data, "MEMORY", 0), mock.patch.object(data, "read_image", die), \
                mock.patch.object(data, "has_small_images", lambda name: True):
            assert_refused(run("pretrain", *flags), ("was killed", "fewer --workers"))

    def test_ctrl_c_with_workers(self):
        """The whole group gets the signal, as from a terminal: exit code 130, and no traceback."""
        program = ("import pretrain\nfrom support import cli, data\ndata.MEMORY = 0\n"
                   "cli.run_script(pretrain.main, resumable=True)")
        folder = new_folder() / "my runs"
        running = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, (*training(500), *photo_flags(folder))),
             "--workers", "2", "--device", "cpu"], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while not list(folder.rglob("checkpoint.pt")):
            self.assertIsNone(running.poll())
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=60)
        self.assertEqual(running.returncode, 130, err)
        self.assertNotIn("Traceback", err)
        self.assertIn("--resume", err)
        self.assertIn("'" + str(folder) + "'", err)  # quoted, since it has a blank

    def test_swallowed_ctrl_c(self):
        """Lost in a destructor it is raised again at the next batch."""
        dataset = data.load_dataset("digits", "val", 32)
        with mock.patch.object(cli.Interruption, "requested", True):
            with self.assertRaises(KeyboardInterrupt):
                next(iter(data.Loader(dataset, 10)))
        next(iter(data.Loader(dataset, 10)))

    def test_what_ctrl_c_says(self):
        """A run that can be resumed: by its own command, without --overwrite."""
        def interrupted():
            raise KeyboardInterrupt
        for resumable in (True, False):
            with mock.patch.object(sys, "argv", ["pretrain.py", "--seed", "3", "--overwrite"]), \
                    contextlib.redirect_stderr(io.StringIO()) as err, \
                    self.assertRaises(SystemExit) as stop:
                cli.run_script(interrupted, resumable)
            self.assertEqual(stop.exception.code, 130)
            self.assertEqual("python pretrain.py --seed 3 --resume" in err.getvalue(), resumable)
            self.assertNotIn("--overwrite", err.getvalue())

    def test_out_of_memory(self):
        """Of a GPU, of PyTorch's allocator for the CPU, of Python: what to do."""
        for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                      RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't "
                                   "allocate memory: you tried to allocate 9 bytes.")):
            with mock.patch("pretrain.arguments", side_effect=error):
                assert_refused(run("pretrain"), ("out of memory", "--max-batch"))
        with mock.patch("pretrain.arguments", side_effect=RuntimeError("a bug")), \
                self.assertRaisesRegex(RuntimeError, "a bug"):
            run("pretrain")


class TestImages(unittest.TestCase):
    def test_formats(self):
        """What is in the file counts, not its name; PostScript is handed to nobody."""
        folder = new_folder()
        image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
        for name in ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP"):
            image.save(folder / "image.jpg", name)
            self.assertEqual(data.read_image(folder / "image.jpg").size, (8, 8))
        for name in ("EPS", "GIF", "PDF"):
            image.save(folder / "image.jpg", name)
            with self.assertRaisesRegex(UserError, "cannot read image"):
                data.read_image(folder / "image.jpg")

    def test_rotation(self):
        """As the camera was held: EXIF's orientation."""
        path, exif = new_folder() / "image.jpg", Image.Exif()
        exif[0x0112] = 6  # a quarter turn
        Image.fromarray(np.zeros((8, 20, 3), np.uint8)).save(path, exif=exif)
        self.assertEqual(data.read_image(path).size, (8, 20))

    def test_split(self):
        for name in ("digits", str(photos()), "cifar10"):
            with self.assertRaisesRegex(UserError, "train, val, test"):
                data.load_dataset(name, "foo", 32)

    def test_moved_folder(self):
        """A run goes on when its folder was moved; not with other images under the same name."""
        folder, images = new_folder(), copy_of_photos()
        flags = training(2)
        finished(run("pretrain", *flags, *photo_flags(folder, images)))
        moved = new_folder() / "photos"
        shutil.move(images, moved)
        for name in (moved, f"{moved}/"):
            again = finished(run("pretrain", *flags, *photo_flags(folder, name)))
            self.assertIn("finished run kept", again.out)
        image = next(moved.glob("train/red/*"))
        Image.open(image).resize((9, 9)).save(image)
        refused = run("pretrain", *flags, *photo_flags(folder, moved))
        assert_refused(refused, "data folder ")

    def test_download(self):
        """By the process of rank 0, while the others wait; then by them, who find it there."""
        for rank, expected in ((0, ["inside", "wait"]), (1, ["wait", "inside"])):
            order = []
            with mock.patch.object(cli.dist, "is_initialized", return_value=True), \
                    mock.patch.object(cli.dist, "get_rank", return_value=rank), \
                    mock.patch.object(cli.dist, "barrier", lambda: order.append("wait")), \
                    cli.rank_0_first():
                order.append("inside")
            self.assertEqual(order, expected)
