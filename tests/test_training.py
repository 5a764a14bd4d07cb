"""What both training stages share: the schedule, AdamW's groups, batches, precision, the log."""

import contextlib
import io
import math
import subprocess
import sys
import unittest
from unittest import mock

import torch
from torch import nn

from model import UserError
from support import cli, runs, training
from tests.helpers import (REPOSITORY, assert_near, assert_refused, finished, new_folder, photo_flags,
                           photo_runs, read_csv, run, small_autoencoder, small_classifier)


class TestTraining(unittest.TestCase):
    def test_learning_rate(self):
        rates = [training.learning_rate(step, 100, 20, 2.0, 0.5) for step in range(101)]
        self.assertEqual(rates[0], 0)
        self.assertAlmostEqual(rates[10], 1)
        self.assertAlmostEqual(rates[20], 2)
        self.assertAlmostEqual(rates[60], 1.25)  # half the way down
        self.assertAlmostEqual(rates[40], 0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
        self.assertAlmostEqual(rates[100], 0.5)
        self.assertEqual(max(rates), rates[20])
        self.assertEqual(training.learning_rate(0, 100, 0, 2.0, 0.5), 2.0)  # no warm-up

    def test_warmup_is_a_share_of_the_epochs(self):
        """--epochs alone is enough; a warm-up as long as the training is refused."""
        runs, _ = photo_runs()
        for script, epochs, warmup in (("pretrain", 5, "0.5"), ("finetune", 6, "0.5")):
            flags = (*photo_flags(runs), "--epochs", epochs, "--overwrite")
            result = finished(run(script, *flags, "--dry-run"))
            self.assertIn(f"epochs          {epochs}, {warmup} of them warm-up", result.out)
            refused = run(script, *flags, "--warmup-epochs", epochs)
            assert_refused(refused, (f"{epochs} epochs", "fewer --warmup-epochs"))
        for script in ("pretrain", "finetune"):
            finished(run(script, *photo_flags(runs), "--epochs", 5, "--overwrite"))

    def test_parameter_groups(self):
        classifier, found = small_classifier(), {}
        groups = training.parameter_groups(classifier, 0.05, layer_decay=0.5)
        names = {id(parameter): name for name, parameter in classifier.named_parameters()}
        for group in groups:
            for parameter in group["params"]:
                found[names[id(parameter)]] = group["weight_decay"], group["lr_scale"]
        self.assertEqual(set(found), set(names.values()))
        self.assertEqual(sum(len(group["params"]) for group in groups), len(names))
        for name, expected in {
                "cls_token": (0, 0.125), "pos_embed": (0, 0.125),
                "patch_embed.proj.bias": (0, 0.125), "patch_embed.proj.weight": (0.05, 0.125),
                "blocks.0.attn.qkv.weight": (0.05, 0.25), "blocks.1.attn.qkv.weight": (0.05, 0.5),
                "blocks.1.norm1.weight": (0, 0.5), "fc_norm.weight": (0, 1),
                "head.weight": (0.05, 1), "head.bias": (0, 1)}.items():
            self.assertEqual(found[name], expected, name)
        pretraining = training.parameter_groups(small_autoencoder(), 0.05)
        self.assertEqual({group["lr_scale"] for group in pretraining}, {1})
        self.assertTrue(all(p.requires_grad for group in pretraining for p in group["params"]))

    def test_update(self):
        layers = [nn.Parameter(torch.ones(())) for _ in range(2)]
        optimizer = torch.optim.SGD([dict(params=[layers[0]], lr_scale=1.0),
                                     dict(params=[layers[1]], lr_scale=0.25)])
        for _ in range(2):  # gradients add up over micro-batches, not over steps
            for _ in range(3):
                (layers[0] + layers[1]).backward()
            training.update(optimizer, lr=0.1)
        assert_near(torch.stack(layers).detach(), torch.tensor([1 - 0.6, 1 - 0.15]))

    def test_plan_of_batches(self):
        """As few equal micro-batches as fit; a batch no larger than the data set."""
        for given, expected in [((32, 256, 1000), (32, 1, 31)), ((32, 10, 1000), (32, 4, 31)),
                                ((32, 256, 20), (20, 1, 1)), ((7, 3, 70), (6, 3, 11))]:
            self.assertEqual(training.plan_batches(*given), expected)
        with mock.patch.object(cli, "process_count", return_value=3):
            self.assertEqual(training.plan_batches(32, 5, 100), (30, 2, 3))
            self.assertRaises(UserError, training.plan_batches, 2, 5, 100)

    def test_autocast(self):
        """bfloat16 where it is asked for."""
        product = lambda: torch.ones(2, 2) @ torch.ones(2, 2)
        for bf16, expected in ((True, torch.bfloat16), (False, torch.float32), (None, torch.float32)):
            with cli.autocast(bf16, torch.device("cpu")):
                self.assertEqual(product().dtype, expected)

    def test_slow_bf16_is_told(self):
        """Once, where it is asked for and slower; whatever the script."""
        self.addCleanup(cli.note_slow_bf16.cache_clear)
        for bf16, faster, lines in ((True, False, 1), (True, True, 0), (False, False, 0)):
            cli.note_slow_bf16.cache_clear()
            with mock.patch.object(cli, "bf16_is_faster", return_value=faster), \
                    contextlib.redirect_stdout(io.StringIO()) as out:
                for _ in range(3):
                    cli.autocast(bf16, torch.device("cpu"))
            self.assertEqual(out.getvalue().count("slower than float32"), lines)

    def test_training_precision(self):
        """As --bf16 says; else on a GPU, and on a CPU where it is faster, but not for the digits."""
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        for faster in (True, False):
            with mock.patch.object(cli, "bf16_is_faster", return_value=faster):
                self.assertTrue(cli.training_precision(None, gpu, "tiny"))
                self.assertFalse(cli.training_precision(False, gpu, "base"))
                self.assertEqual(cli.training_precision(None, cpu, "small"), faster)
                self.assertFalse(cli.training_precision(None, cpu, "tiny"))
                self.assertTrue(cli.training_precision(True, cpu, "tiny"))

    def test_bf16_is_timed(self):
        """Faster means clearly faster: under 0.8 of float32's time."""
        for bf16_ends, faster in ((1.5, True), (1.9, False), (3.0, False)):
            cli.bf16_is_faster.cache_clear()
            with mock.patch("time.perf_counter", side_effect=[0.0, 1.0, 1.0, bf16_ends]):
                self.assertEqual(cli.bf16_is_faster(), faster)
        cli.bf16_is_faster.cache_clear()


class TestMemory(unittest.TestCase):
    @unittest.skipUnless(sys.platform == "linux", "glibc is asked")
    def test_freed_memory_is_kept(self):
        """The same tensors need next to no new pages of the system in the sixth step, say."""
        program = ("import resource, torch; from support import cli; cli.open_device('cpu')\n"
                   "def new_pages():\n"
                   "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
                   "    torch.ones(2**24)\n"
                   "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
                   "print(*[new_pages() for step in range(6)])")
        printed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, text=True,
                                 capture_output=True, check=True).stdout
        pages = [int(number) for number in printed.split()]
        self.assertGreater(pages[0], 1000)
        self.assertLess(pages[-1], 100)


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    def isatty(self):
        return True


class TestLog(unittest.TestCase):
    def finish_epoch(self, folder, epoch, hits, seconds=2.0):
        """An epoch of two micro-batches of 10 images, with mean losses 1 and 2; its line."""
        out = io.StringIO()
        with mock.patch("time.time", return_value=1000.0) as now, contextlib.redirect_stdout(out):
            log = training.EpochLog(epoch, 42, 20)
            now.return_value += seconds
            for loss in (1.0, 2.0):
                log.add(torch.tensor(loss), 10, None if hits is None else torch.tensor(hits))
            log.finish(folder, lr=0.01)
        return out.getvalue()

    def test_line(self):
        """Means over the epoch's images, its speed, and the time that the epochs left would take."""
        for hits, accuracy in ((7.5, "accuracy  75.0%  "), (None, "")):
            self.assertEqual(self.finish_epoch(new_folder(), 2, hits),
                             f"epoch    2/42  loss  1.5000  {accuracy}lr 1.0e-02      "
                             "10 images/s  1:20 left\n")

    def test_loss_that_is_not_finite(self):
        """Noticed every so many micro-batches, and before anything is saved; every one is looked at."""
        for bad in (math.nan, math.inf):
            for others in (0, 3, training.LOOK_EVERY):
                log, folder = training.EpochLog(1, 2, 100), new_folder()
                with self.assertRaisesRegex(UserError, "the loss is (nan|inf) in epoch 1"):
                    for loss in (*[1.0] * others, bad, *[1.0] * others):
                        log.add(torch.tensor(loss), 10)
                    log.finish(folder, lr=0.1)
                self.assertEqual(list(folder.iterdir()), [])

    def test_row(self):
        folder = new_folder()
        self.finish_epoch(folder, 1, 5, seconds=4.0)
        self.finish_epoch(folder, 2, None)
        made_by = runs.provenance()
        self.assertEqual(made_by["torch"], torch.__version__)
        self.assertEqual([{**row, **dict.fromkeys(made_by)} for row in read_csv(folder / "log.csv")], [
            dict(epoch="1", loss="1.500000", accuracy="50.00", lr="1.000e-02", images_per_second="5.0",
                 **dict.fromkeys(made_by)),
            dict(epoch="2", loss="1.500000", accuracy="", lr="1.000e-02", images_per_second="10.0",
                 **dict.fromkeys(made_by))])
        for name, value in made_by.items():
            self.assertEqual(read_csv(folder / "log.csv")[1][name], value)

    def test_rows_of_later_epochs_are_replaced(self):
        """They were written by a run that was killed before it saved, or that is trained anew."""
        folder = new_folder()
        for epoch, expected in ((1, "1"), (2, "12"), (3, "123"), (2, "12"), (3, "123"), (1, "1")):
            self.finish_epoch(folder, epoch, None)
            self.assertEqual("".join(row["epoch"] for row in read_csv(folder / "log.csv")), expected)

    def test_progress_on_a_terminal(self):
        """One line that is rewritten, not too often, and removed before a lasting one."""
        with mock.patch("sys.stdout", Terminal()) as out, \
                mock.patch("time.time", return_value=1000.0) as now:
            progress = cli.Progress(every=0.5)
            progress.show("a long text")
            progress.show("comes too soon")
            now.return_value += 1
            progress.show("short")
            progress.clear()
            progress.clear()
        self.assertEqual(out.getvalue(), "\ra long text" "\rshort      " "\r     \r")

    def test_progress_into_a_pipe(self):
        with mock.patch("sys.stdout", io.StringIO()) as out:
            progress = cli.Progress(every=0)
            progress.show("half way")
            progress.clear()
        self.assertEqual(out.getvalue(), "")
