"""What both training stages share: the schedule, AdamW's groups, batches, precision, the log."""

import argparse
import contextlib
import io
import math
import unittest
from unittest import mock

import torch
from torch import nn
from torch.utils.data import TensorDataset

import finetune
import pretrain
from model import UserError, make_classifier
from support import cli, data, training
from tests.helpers import (assert_near, finished, new_folder, photo_autoencoder, photo_flags, run, saved,
                           small_autoencoder, small_classifier)


def plan(batch_size, max_batch, images):
    """(images of a batch, its micro-batches, steps of an epoch)."""
    dataset = TensorDataset(torch.zeros(images, 1))
    batches = data.TrainingBatches(dataset, batch_size, max_batch, 0, 0, torch.device("cpu"))
    return batches.batch, batches.micro_batches, batches.steps


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
        """--epochs alone is enough."""
        flags = {"pretrain": photo_flags(), "finetune": ("--autoencoder", photo_autoencoder())}
        for script, recipes in (("pretrain", pretrain.RECIPES), ("finetune", finetune.RECIPES)):
            with mock.patch.object(training, "learning_rate", wraps=training.learning_rate) as schedule:
                finished(run(script, *flags[script], "--epochs", 2, "--batch-size", 8, "--out", new_folder()))
            for number, call in enumerate(schedule.call_args_list):
                step, steps, warmup_steps, *_ = call.args
                self.assertEqual((step, steps), (number, 6))
                self.assertAlmostEqual(warmup_steps, 6 * recipes["tiny"]["warmup_share"])
            self.assertEqual(schedule.call_count, 6)

    def test_plan_is_said(self):
        """One line at every start: images, steps, batch, peak learning rate, parameters, device."""
        out = new_folder()
        flags = ("--epochs", 3, "--batch-size", 10, "--max-batch", 4, "--base-lr", 0.64, "--out", out)
        result = finished(run("pretrain", *photo_flags(), *flags))
        millions = sum(value.numel() for value in saved(out)["model"].values()) / 1e6
        said = ("\n24 images, 6 steps of 9 in 3 epochs, peak lr 0.0225; "
                f"{millions:.2f} million parameters on 1 x cpu (1 threads)\n")
        self.assertEqual(result.out.count(said), 1)
        resumed = finished(run("pretrain", "--out", out, "--resume"))
        self.assertEqual(resumed.out.count(said), 1)

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
        both = nn.ModuleList([classifier, small_autoencoder()])  # their layers could not be told
        self.assertRaisesRegex(UserError, "layer decay 0.5", training.parameter_groups, both, 0.05, 0.5)
        training.parameter_groups(both, 0.05)
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
        """As few micro-batches of one size as fit; a batch no larger than the data set."""
        for given, expected in [
                ((32, 256, 1000), (32, 1, 31)), ((32, 10, 1000), (32, 4, 31)),
                ((32, 256, 20), (20, 1, 1)), ((7, 3, 70), (6, 3, 11)), ((257, 256, 1000), (256, 2, 3)),
                ((512, 256, 1000), (512, 2, 1)), ((100, 33, 100), (100, 4, 1))]:
            self.assertEqual(plan(*given), expected)
        with mock.patch.object(cli, "world_size", return_value=3):
            self.assertEqual(plan(32, 5, 100), (30, 2, 3))
            self.assertRaises(UserError, plan, 2, 5, 100)

    def test_autocast(self):
        """bfloat16 where it is asked for."""
        product = lambda: torch.ones(2, 2) @ torch.ones(2, 2)
        for bf16, expected in ((True, torch.bfloat16), (False, torch.float32), (None, torch.float32)):
            with cli.autocast(bf16, torch.device("cpu")):
                self.assertEqual(product().dtype, expected)

    def test_distribute(self):
        """What trains parameters outside the model, whose gradients nobody averages, is refused."""
        classifier, autoencoder = small_classifier(), small_autoencoder()
        optimizer = torch.optim.SGD(classifier.parameters())
        self.assertIs(training.distribute(classifier, optimizer), classifier)
        optimizer.add_param_group(dict(params=[autoencoder.decoder_pred.weight]))
        for model in (classifier, autoencoder):
            with self.assertRaisesRegex(UserError, "training.distribute does not hold: .* into one module"):
                training.distribute(model, optimizer)
        both = nn.ModuleList([classifier, autoencoder])
        self.assertIs(training.distribute(both, optimizer), both)

    def initialized(self, model, other):
        """What training.initialize says."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            training.initialize(model, other, "runs/x")
        return out.getvalue()

    def test_initialize(self):
        """The weights of the same names; what has none, or a head for other classes, is left and said."""
        autoencoder, fresh = small_autoencoder(seed=1), small_classifier(seed=2)
        classifier, other = small_classifier(seed=2), small_classifier(seed=3, num_classes=7)
        self.assertEqual(self.initialized(classifier, autoencoder),
                         "weights from runs/x; at their initial value: fc_norm, head\n")
        given, own, before = autoencoder.state_dict(), classifier.state_dict(), fresh.state_dict()
        for name, value in own.items():
            expected = before[name] if name.startswith(("fc_norm", "head")) else given[name]
            self.assertTrue(torch.equal(value, expected), name)
        self.assertEqual(self.initialized(classifier, other),
                         "weights from runs/x; at their initial value: head\n")
        self.assertTrue(torch.equal(classifier.head.weight, before["head.weight"]))
        self.assertTrue(torch.equal(classifier.fc_norm.weight, other.fc_norm.weight))
        self.assertTrue(torch.equal(classifier.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight))
        self.assertIn("initial value: none\n", self.initialized(classifier, small_classifier(seed=4)))
        self.assertIn("note: runs/x normalizes by another mean, ",
                      self.initialized(classifier, small_classifier(mean=(0.1, 0.2, 0.3))))

    def test_initialize_from_what_does_not_fit(self):
        """Another kind of network, or one of another width, in a sentence; nothing is taken."""
        classifier = small_classifier()
        before = {name: value.clone() for name, value in classifier.state_dict().items()}
        resnet = make_classifier("resnet18", num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
        wide = small_classifier(seed=1, embed_dim=32)
        for other, words in ((resnet, "runs/x has no weights in common"),
                             (wide, r"cls_token is \[1, 1, 32\] in runs/x and \[1, 1, 16\] here")):
            with self.assertRaisesRegex(UserError, words):
                training.initialize(classifier, other, "runs/x")
        for name, value in classifier.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]), name)

    def apply_recipe(self, recipe, device="cpu", special="clean", recipes=None, **given):
        """The arguments that a recipe makes of those given."""
        open_ones = dict.fromkeys(["epochs", "max_batch", "seed", "bf16"])
        args = argparse.Namespace(**{**open_ones, "size": "tiny", **given})
        whole = dict(epochs=10, warmup_share=0.1, **recipe)
        cli.apply_recipe(args, {args.size: whole, **(recipes or {})}, special, torch.device(device))
        return args

    def test_training_precision(self):
        """As --bf16 says; else bfloat16 on a GPU and nowhere else: no clock decides."""
        for bf16, device, expected in [(None, "cpu", False), (None, "cuda", True), (True, "cpu", True),
                                       (False, "cuda", False)]:
            self.assertIs(self.apply_recipe({}, device, bf16=bf16).bf16, expected)

    def test_recipe_fills_in_what_is_open(self):
        """A flag that was given stays; what has no flag shows in the settings, too."""
        args = self.apply_recipe(dict(drop_path=0.2))
        self.assertEqual((args.epochs, args.warmup_share, args.max_batch, args.seed, args.drop_path),
                         (10, 0.1, 256, 0, 0.2))
        args = self.apply_recipe({}, epochs=4, size="huge", seed=7)
        self.assertEqual((args.epochs, args.warmup_share, args.max_batch, args.seed), (4, 0.1, 64, 7))

    def test_special_recipe(self):
        """That of size and mode where there is one; that another one is used is said, where it may matter."""
        adversarial = {"small adversarial": dict(epochs=3)}
        said = "note: there is no recipe for 'tiny adversarial': that of 'tiny' is used\n"
        for size, special, epochs, note in [
                ("small", "adversarial", 3, ""), ("small", "clean", 10, ""),  # no size has one for clean
                ("tiny", "adversarial", 10, said)]:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                args = self.apply_recipe({}, special=special, recipes=adversarial, size=size)
            self.assertEqual((args.epochs, out.getvalue()), (epochs, note))
        flags = ("--mode", "no-denoise", "--from-scratch", "--epochs", 1, *photo_flags()[:2])
        for size, falls_back in (("small", True), ("tiny", False)):
            result = finished(run("finetune", *flags, "--size", size, "--out", new_folder()))
            note = f"note: there is no recipe for '{size} no-denoise': that of '{size}' is used"
            self.assertEqual(note in result.out, falls_back)


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    def isatty(self):
        return True


class TestLog(unittest.TestCase):
    def finish_epoch(self, epoch, hits, seconds=2.0):
        """An epoch of two micro-batches of 10 images, with mean losses 1 and 2: (its row, its line)."""
        out = io.StringIO()
        with mock.patch("time.perf_counter", return_value=1000.0) as now, contextlib.redirect_stdout(out):
            log = training.EpochLog(epoch, 42, 20)
            now.return_value += seconds
            for loss in (1.0, 2.0):
                log.add(torch.tensor(loss), 10, None if hits is None else torch.tensor(hits))
            row = log.finish(lr=0.01)
        return row, out.getvalue()

    def test_line(self):
        """Means over the epoch's images, its speed, and the time that the epochs left would take."""
        for hits, accuracy in ((7, "accuracy  70.0%  "), (None, "")):
            self.assertEqual(self.finish_epoch(2, hits)[1],
                             f"epoch    2/42  loss  1.5000  {accuracy}lr 1.0e-02      "
                             "10 images/s  1:20 left\n")

    def test_row(self):
        for hits, accuracy in ((5, "50.00"), (None, "")):
            self.assertEqual(self.finish_epoch(1, hits, seconds=4.0)[0], dict(
                epoch=1, loss="1.500000", accuracy=accuracy, lr="1.000e-02", images_per_second="5.0"))

    def test_loss_that_is_not_finite(self):
        """One of an epoch is enough, wherever it comes."""
        for bad in (math.nan, math.inf):
            for place in (0, 3, 6):
                log, losses = training.EpochLog(1, 2, 100), [1.0] * 7
                losses[place] = bad
                for loss in losses:
                    log.add(torch.tensor(loss), 10)
                with self.assertRaisesRegex(UserError, "the loss is (nan|inf) in epoch 1"):
                    log.finish(lr=0.1)

    def test_progress_on_a_terminal(self):
        """One line that is rewritten, not too often, and removed before a lasting one."""
        with mock.patch("sys.stdout", Terminal()) as out, \
                mock.patch("time.perf_counter", return_value=1000.0) as now:
            progress = cli.Progress()
            now.return_value += 10
            progress.show("a long text", 1 / 4)
            progress.show("comes too soon", 1 / 2)
            now.return_value += 80
            progress.show("short", 1 / 2)
            progress.clear()
            progress.clear()
            now.return_value += 3
            progress.show("timed anew", 1 / 2)
        self.assertEqual(out.getvalue().split("\033[K"), [
            "\ra long text, 0:30 left", "\rshort, 1:30 left", "\r", "\rtimed anew, 0:03 left", ""])

    def test_progress_into_a_pipe(self):
        with mock.patch("sys.stdout", io.StringIO()) as out:
            progress = cli.Progress()
            progress.show("half way", 1 / 2)
            progress.clear()
        self.assertEqual(out.getvalue(), "")
