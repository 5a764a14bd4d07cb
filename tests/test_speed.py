"""The speed study: its plain De³ is ours in other words, the check of it can fail, and its table."""

import functools
import re
import unittest
from unittest import mock

import torch

from attack import pgd
from model import SIZES, Autoencoder, Classifier, De3, UserError
from studies import speed
from tests.helpers import assert_near, assert_refused, finished, random_images, run, seeded

SHORT = ("--size", "tiny", "--batch", 1, "--seconds", 0)
WORK = ("pretraining, images", "fine-tuning, images", "De³, images", "PGD, EOT 1, gradients",
        "PGD, EOT 8, gradients")


@functools.cache
def models():
    """An autoencoder and a classifier of different sizes of blocks, no weight of them 0."""
    torch.manual_seed(0)
    size = SIZES["small"]
    autoencoder = Autoencoder(**size)
    classifier = Classifier(**{name: size[name] for name in size if not name.startswith("decoder")})
    for parameter in [*autoencoder.parameters(), *classifier.parameters()]:
        parameter.data += 0.05 * torch.randn_like(parameter)
    return autoencoder, classifier


def plain_model():
    """The plain De³ with the weights of models(): a function of images and noise."""
    autoencoder, classifier = models()
    return functools.partial(speed.plain_de3, autoencoder=autoencoder.state_dict(),
                             classifier=classifier.state_dict(), size=SIZES["small"])


def one_head(x, state, name, depth, heads):
    """Blocks with a wrong number of heads."""
    return PLAIN_BLOCKS(x, state, name, depth, 1)


PLAIN_BLOCKS = speed.plain_blocks


class TestPlain(unittest.TestCase):
    def setUp(self):
        self.images, self.labels = random_images(3, 3, 32, 32), torch.tensor([0, 3, 9])

    def test_same_logits(self):
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ours = De3(*models(), speed.SIGMA, noise=noise)(self.images)
            assert_near(plain_model()(self.images, noise), ours, atol=1e-5, rtol=1e-4)
        self.assertGreater(ours.std(0).min(), 1e-3)  # the images do matter

    def test_same_gradient(self):
        difference = speed.gradient_difference(plain_model(), *models(), self.images, self.labels)
        self.assertLess(difference, 1e-5)

    def test_difference_is_noticed(self):
        """Another number of heads, a forgotten bias, noise of another strength."""
        arguments = plain_model(), *models(), self.images, self.labels
        with mock.patch.object(speed, "plain_blocks", one_head):
            self.assertRaises(UserError, speed.gradient_difference, *arguments)
        without_bias = plain_model()
        without_bias.keywords["classifier"]["blocks.0.attn.proj.bias"] = torch.zeros(144)
        self.assertRaises(UserError, speed.gradient_difference, without_bias, *arguments[1:])
        louder = functools.partial(lambda x, noise: plain_model()(x, 1.01 * noise))
        self.assertRaises(UserError, speed.gradient_difference, louder, *arguments[1:])

    def test_pgd(self):
        """Under one noise plain's adversarial images are ours, but where a gradient is about 0."""
        noise, same_noise = torch.randn(3, 32, 32), plain_model()
        ours = seeded(lambda: pgd(De3(*models(), speed.SIGMA, noise=noise), self.images, self.labels,
                                  speed.EPS, speed.STEPS, eot=2))
        plain = seeded(speed.plain_pgd, lambda x, _: same_noise(x, noise), self.images, self.labels, 2)
        self.assertGreater(((ours - plain).abs() < 1e-6).double().mean().item(), 0.99)
        self.assertGreater((plain - self.images).abs().mean().item(), speed.EPS / 2)

    def test_fresh_draws(self):
        """Each of the EOT draws of each step has its own noise."""
        seen = []

        def plain(x, noise):
            seen.append(noise)
            return x.flatten(1)[:, :10]
        speed.plain_pgd(plain, self.images, self.labels, 3)
        self.assertEqual(len({noise.sum().item() for noise in seen}), 3 * speed.STEPS)


class TestSpeed(unittest.TestCase):
    def test_measure(self):
        """In turns, and the fastest counts."""
        order = []
        calls = {name: functools.partial(order.append, name) for name in "ab"}
        with mock.patch("time.perf_counter", side_effect=[0, 5, 10, 17, 20, 23, 30, 36]):
            measured = speed.measure(calls, 0, torch.device("cpu"))
        self.assertEqual(order, list("abab"))
        self.assertEqual({name: seconds for name, (seconds, _) in measured.items()}, {"a": 3, "b": 6})
        self.assertTrue(10**7 < measured["a"][1] <= measured["b"][1] < 10**12)  # bytes

    def test_script(self):
        """All rows, with positive figures; our models are compiled if that is asked for."""
        for flags, precisions in (("--no-bf16 --compile", ["fp32"]), ("--bf16", ["fp32", "bf16"])):
            with mock.patch.object(speed, "compile_models") as compile_models:
                out = finished(run("studies.speed", *SHORT, *flags.split())).out
            self.assertEqual(compile_models.called, "--compile" in flags)
            self.assertEqual(re.findall(r"^matrix product, (\w+): +\d", out, re.M), precisions)
            rows = re.findall(r"^(\w.*?)  +(plain|ours) (\w+) +([\d.e+]+) +(?:([\d.]+) +)?([\d.]+|-) +"
                              r"([\d.]+)$", out, re.M)
            ours = [("ours", precision) for precision in precisions]
            plain = [("plain", "fp32")]
            self.assertEqual([row[:3] for row in rows], [
                (name, *who) for name in WORK for who in (plain + ours if "PGD" in name else ours)])
            for name, who, _, rate, ratio, share, peak in rows:
                self.assertGreater(min(float(rate), float(peak)), 0)
                self.assertGreaterEqual(float(share), 0)
                self.assertEqual(bool(ratio), "PGD" in name)
                if who == "plain":
                    self.assertEqual(ratio, "1.00")
            self.assertIn("it can only grow", out)

    def test_script_refuses(self):
        """A plain De³ that is not ours, and bad flags."""
        with mock.patch.object(speed, "plain_blocks", one_head):
            assert_refused(run("studies.speed", *SHORT), "differ by")
        for flag, value in (("--size", "enormous"), ("--batch", 0), ("--seconds", "x"),
                            ("--data", "digits"), ("--device", "meta")):
            assert_refused(run("studies.speed", flag, value), flag)
