"""The settings of `pgd`: the ball holds under all of them, and more of each is not weaker."""

import unittest

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import attack
from attack import pgd
from model import De3
from tests.helpers import Linear, assert_near, random_images, seeded, small_classifier


class TestPgdOptions(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.images = random_images(6, 3, 16, 16)
        self.labels = torch.arange(6)
        self.model = small_classifier()

    def test_default_step_size(self):
        """2.5·eps/steps: from the image, one step of it is cut back to eps, one of ten is not."""
        model, labels = Linear((3, 16, 16)), torch.zeros(6, dtype=torch.long)
        seen = []
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        images = self.images * 0.2 + 0.4
        pgd(model, images, labels, 0.1, 10, random_start=False)
        self.assertEqual(len(seen), 10)
        assert_near((seen[1] - seen[0]).abs(), torch.full_like(images, 0.025), atol=1e-6)

    def test_invariants(self):
        """In the ball, in [0, 1], without gradients, whatever the settings."""
        choice = np.random.default_rng(0)
        for trial in range(24):
            norm = ("linf", "l2")[trial % 2]
            eps = float(choice.uniform(0, 0.5 if norm == "linf" else 5))
            settings = dict(steps=int(choice.integers(1, 5)), restarts=int(choice.integers(1, 3)),
                            eot=int(choice.integers(1, 3)), loss=("ce", "margin")[trial // 2 % 2],
                            random_start=bool(trial % 3), targets=self.labels.flip(0)
                            if trial % 4 == 0 else None, step_size=(None, 10.0)[trial // 4 % 2])
            with self.subTest(norm=norm, eps=eps, **settings):
                x = pgd(self.model, self.images, self.labels, eps, norm=norm, **settings)
                self.assertTrue(0 <= x.min() and x.max() <= 1 and not x.requires_grad)
                delta = (x - self.images).flatten(1)
                length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
                self.assertLess(length.max(), eps + 1e-5)
                self.assertGreater(length.max(), 0)
        for norm in ("linf", "l2"):
            assert_near(pgd(self.model, self.images, self.labels, 0, 3, norm=norm), self.images)

    def test_stronger_than_random_and_targeted(self):
        labels = self.model(self.images).argmax(1)
        loss = lambda x, y: F.cross_entropy(self.model(x), y, reduction="none")
        x = pgd(self.model, self.images, labels, 0.03, 10)
        noise = attack.random_point(self.images, 0.03, "linf")
        self.assertTrue((loss(x, labels) > loss(noise, labels)).all())
        targets = (labels + 1) % 10
        x = pgd(self.model, self.images, labels, 0.03, 10, targets=targets)
        self.assertTrue((loss(x, targets) < loss(self.images, targets)).all())

    def test_gradient_is_a_mean(self):
        one, three = (attack.input_gradient(self.model, self.images, self.labels, None, "ce", eot)[0]
                      for eot in (1, 3))
        assert_near(one, three)

    def test_draws_are_fresh(self):
        """Each step and each of its eot draws is a new call of the model, and of its noise."""
        model = De3(None, small_classifier(), 50)
        calls = []
        model.classifier.register_forward_pre_hook(lambda module, x: calls.append(x[0].detach()))
        pgd(model, self.images, self.labels, 0, steps=3, eot=4)
        self.assertEqual(len(calls), 12)
        self.assertEqual(len({call.sum().item() for call in calls}), 12)

    def test_draws_together(self):
        """EOT draws in one batch: as many as max_batch allows, with the same mean gradient."""
        sizes = []
        hook = self.model.register_forward_pre_hook(lambda module, x: sizes.append(len(x[0])))
        one, _ = attack.input_gradient(self.model, self.images, self.labels, None, "ce", 1)
        for max_batch, expected in [(None, [6] * 5), (6, [6] * 5), (17, [12, 12, 6]), (30, [30]),
                                    (1000, [30]), (2, [6] * 5)]:
            sizes.clear()
            many, margins = attack.input_gradient(self.model, self.images, self.labels, None, "ce", 5,
                                                  max_batch)
            self.assertEqual(sizes, expected)
            assert_near(many, one)
            assert_near(margins, attack.margin(self.model(self.images), self.labels).detach())
        hook.remove()

    def test_early_stop(self):
        """Images that already err stay as they are; no image that would be fooled is lost."""
        images = random_images(40, 3, 16, 16, seed=2)
        labels = self.model(images).argmax(1)
        labels[:3] = (labels[:3] + 1) % 10  # err from the start
        robust = {}
        for early_stop in (False, True):
            x = pgd(self.model, images, labels, 0.02, 10, random_start=False, early_stop=early_stop)
            robust[early_stop] = self.model(x).argmax(1) == labels
        self.assertTrue(torch.equal(x[:3], images[:3]))
        self.assertTrue(0 < robust[False].sum() < 37)
        self.assertTrue((robust[True] <= robust[False]).all())

    def test_early_stop_asks_for_a_margin(self):
        """An image that is fooled by less than rounding can undo is attacked further."""
        images, labels = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
        model = Linear()
        score = model(images)[0, 1].item()
        for gain, stays in ((0.1, False), (10, True)):
            model.bias = -score + gain * attack.FOOLED_MARGIN
            x = pgd(model, images, labels, 0.1, 1, random_start=False, early_stop=True)
            self.assertEqual(torch.equal(x, images), stays)

    def test_restarts(self):
        images = random_images(40, 3, 16, 16, seed=2)
        labels = self.model(images).argmax(1)
        gains = {}
        for restarts in (1, 4):
            x = seeded(lambda: pgd(self.model, images, labels, 0.02, 1, restarts=restarts))
            gains[restarts] = attack.margin(self.model(x), labels)
        self.assertGreaterEqual((gains[4] > 0).sum(), (gains[1] > 0).sum())
        self.assertTrue((gains[4] >= gains[1] - 1e-5).all())
        self.assertGreater(gains[4].mean(), gains[1].mean())

    def test_strongest(self):
        """The error rate decides, then the margin; here in one fixed cycle of draws."""
        class Cycle(nn.Module):
            draw = 0

            def forward(self, x):  # dark: errs narrowly in 9 of 10 draws; bright: widely in 1
                self.draw += 1
                often = torch.tensor(0.01 if self.draw % 10 else -1.0)
                rarely = torch.tensor(-0.01 if self.draw % 10 else 100.0)
                score = torch.where(x[:, 0, 0, 0] < 0.5, often, rarely)
                return torch.stack([torch.zeros_like(score), score], dim=1)
        often, rarely = torch.full((2, 3, 4, 4), 0.1), torch.full((2, 3, 4, 4), 0.9)
        labels = torch.zeros(2, dtype=torch.long)
        for candidates in ([often, rarely], [rarely, often]):
            assert_near(attack.strongest(Cycle(), candidates, labels), often)
        one, two = often.clone(), often.clone()
        one[0], two[1] = 0.3, 0.3  # each candidate is the better one for one of two images
        model = Linear((3, 4, 4), bias=50)  # errs everywhere: the margin decides
        score = model(one)[:, 1] > model(two)[:, 1]
        expected = torch.where(score.view(-1, 1, 1, 1), one, two)
        self.assertEqual(score.sum(), 1)
        assert_near(attack.strongest(model, [one, two], labels), expected)

    def test_strongest_draws_once_where_nothing_is_random(self):
        for sigma, draws in ((0, 1), (50, 10)):
            model, calls = De3(None, small_classifier(), sigma), []
            model.classifier.register_forward_pre_hook(lambda module, x: calls.append(x))
            attack.strongest(model, [self.images, self.images], self.labels)
            self.assertEqual(len(calls), 2 * draws)

    def test_without_gradients(self):
        """Works under no_grad and for frozen models, and leaves no gradient behind."""
        expected = seeded(lambda: pgd(self.model, self.images, self.labels, 0.1, 2))
        self.model.requires_grad_(False)
        with torch.no_grad():
            actual = seeded(lambda: pgd(self.model, self.images, self.labels, 0.1, 2))
        assert_near(actual, expected)
        self.model.requires_grad_(True)
        pgd(self.model, self.images, self.labels, 0.1, 2)
        self.assertTrue(all(p.grad is None for p in self.model.parameters()))
