"""The settings of `pgd`: the ball holds under all of them, more of each is not weaker; its warnings."""

import random
import unittest
import warnings
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import attack
from attack import pgd
from model import De3, NoiseOnly, UserError, make_classifier
from tests.helpers import (Linear, assert_near, linear_on_digits, random_images, seeded,
                           small_autoencoder, small_classifier)


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
            with self.subTest(norm=norm, eps=eps, **settings), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the step size of 10
                x = pgd(self.model, self.images, self.labels, eps, norm=norm, **settings)
                self.assertTrue(0 <= x.min() and x.max() <= 1 and not x.requires_grad)
                delta = (x - self.images).flatten(1)
                length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
                self.assertLess(length.max(), eps + 1e-5)
                self.assertGreater(length.max(), 0)

    def test_eps_0(self):
        """The images themselves, without a warning: the clean accuracy."""
        with warnings.catch_warnings(action="error"):
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

    def test_targets_steer_and_the_label_decides(self):
        """The gradient lowers the loss of the targets; it has succeeded where the label is not predicted."""
        labels = self.model(self.images).argmax(1)
        targets = (labels + 1) % 10
        x = self.images.clone().requires_grad_()
        lowered = -F.cross_entropy(self.model(x), targets, reduction="sum")
        gradient, margins = attack.input_gradient(self.model, self.images, labels, targets=targets)
        assert_near(gradient, torch.autograd.grad(lowered, x)[0])
        assert_near(margins, attack.margin(self.model(self.images), labels).detach())
        settings = dict(random_start=False, targets=targets)
        third = (labels + 2) % 10  # as labels they are wrong from the start, though not the targets
        stopped = pgd(self.model, self.images, third, 0.03, 10, early_stop=True, **settings)
        self.assertTrue(torch.equal(stopped, self.images))
        moved = pgd(self.model, self.images, third, 0.03, 10, **settings)
        self.assertGreater((moved - self.images).abs().amax((1, 2, 3)).min(), 0.01)

    def test_direction(self):
        """Signs, or the gradient at length 1; nothing where there is no gradient, all where it is tiny."""
        gradient = torch.randn(3, 3, 4, 4) * torch.tensor([1.0, 0.0, 1e-30]).view(-1, 1, 1, 1)
        self.assertTrue(torch.equal(attack.direction_of(gradient, "linf"), gradient.sign()))
        step = attack.direction_of(gradient, "l2")
        assert_near(step.flatten(1).norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
        assert_near(step[0], gradient[0] / gradient[0].norm())

    def test_gradient_is_a_mean(self):
        one, three = (attack.input_gradient(self.model, self.images, self.labels, "ce", eot)[0]
                      for eot in (1, 3))
        assert_near(one, three)

    def test_draws_are_fresh(self):
        """Each step and each of its eot draws is a new call of the model, and of its noise."""
        model = NoiseOnly(None, small_classifier(), 50)
        calls = []
        model.classifier.register_forward_pre_hook(lambda module, x: calls.append(x[0].detach()))
        pgd(model, self.images, self.labels, 0, steps=3, eot=4)
        self.assertEqual(len(calls), 12)
        self.assertEqual(len({call.sum().item() for call in calls}), 12)

    def test_one_draw_a_call(self):
        """A model that draws once for a whole call is averaged over as many draws as any other."""
        class OnePerCall(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model, self.drawn = model, []

            def forward(self, x):
                self.drawn.append(torch.rand(()).item())
                return self.model(x * self.drawn[-1])
        model = OnePerCall(self.model)
        many, successes = attack.input_gradient(model, self.images, self.labels, "ce", 5)
        self.assertEqual(len(set(model.drawn)), 5)
        one_by_one = [(scale * self.images, scale) for scale in model.drawn]
        expected = sum(scale * attack.input_gradient(self.model, x, self.labels, "ce", 1)[0]
                       for x, scale in one_by_one) / 5
        assert_near(many, expected)
        margins = [attack.margin(self.model(x), self.labels).detach() for x, _ in one_by_one]
        assert_near(successes, sum(margins) / 5)

    def test_own_loss(self):
        """Whatever the attacker raises, an image counts as fooled where its label is not predicted.

        A loss that is above 0 everywhere would otherwise end an attack with early stop at once.
        """
        labels = self.model(self.images).argmax(1)

        def smoothed(logits, labels):
            return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
        with mock.patch.dict(attack.LOSSES, smoothed=smoothed):
            x = pgd(self.model, self.images, labels, 0.03, 10, loss="smoothed", early_stop=True)
        plain = pgd(self.model, self.images, labels, 0.03, 10, early_stop=True)
        still_right = [(self.model(images).argmax(1) == labels).sum() for images in (x, plain)]
        self.assertLess(still_right[1], len(labels))
        self.assertLessEqual(still_right[0], still_right[1] + 1)

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

    def test_early_stop_survives_rounding(self):
        """What stops in bfloat16 is fooled in float32 as well, and one by one."""
        images = random_images(60, 3, 16, 16, seed=2)
        labels = self.model(images).argmax(1)
        with torch.autocast("cpu", torch.bfloat16):
            x = pgd(self.model, images, labels, 0.02, 40, 0.0005, random_start=False, early_stop=True)
            _, margins = attack.input_gradient(self.model, x, labels)
            stopped = margins > attack.FOOLED_MARGIN
            one_by_one = torch.cat([self.model(image[None]).argmax(1) for image in x])
        self.assertGreater(stopped.sum(), 40)
        self.assertLess(margins[stopped].median(), 3 * attack.FOOLED_MARGIN)  # they stopped in time
        for predicted in (one_by_one, self.model(x).argmax(1)):
            self.assertFalse((predicted == labels)[stopped].any())

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
        for sigma, draws in ((0, 2), (50, 11)):  # one of them to see whether it is random
            model, calls = NoiseOnly(None, small_classifier(), sigma), []
            model.classifier.register_forward_pre_hook(lambda module, x: calls.append(x))
            attack.strongest(model, [self.images, self.images], self.labels)
            self.assertTrue(2 * draws - 2 <= len(calls) <= 2 * draws, (sigma, len(calls)))

    def test_strong(self):
        """Of several losses and targets the strongest: no weaker than any run of PGD of as many steps."""
        images = random_images(60, 3, 16, 16, seed=2)
        labels = self.model(images).argmax(1)
        settings = dict(eps=0.01, steps=5, early_stop=True)
        strong = seeded(lambda: attack.strong_pgd(self.model, images, labels, **settings))
        attack.check_adversarial(strong, images, 0.01, "linf")
        right = attack.accuracy(self.model, strong, labels)
        for loss in attack.LOSSES:
            x = seeded(lambda: pgd(self.model, images, labels, loss=loss, **settings))
            self.assertLess(right.sum(), attack.accuracy(self.model, x, labels).sum())
        self.assertGreater(right.sum(), 0)

    def test_strong_for_another_model(self):
        """Without early stop all runs attack all images: what just fools this model need not fool another."""
        with mock.patch.object(attack, "pgd", wraps=pgd) as runs:
            x = attack.strong_pgd(self.model, self.images, self.labels, 0.1, 2, early_stop=False)
        attack.check_adversarial(x, self.images, 0.1, "linf")
        others = self.model(self.images).shape[1] - 1
        self.assertEqual(len(runs.call_args_list), 2 * (2 + min(others, attack.MOST_TARGETS)))
        self.assertEqual({len(call.args[1]) for call in runs.call_args_list}, {len(self.images)})

    def test_strong_on_a_random_model(self):
        """Lucky draws do not end it: every image is attacked by every loss in every restart, with EOT."""
        model = NoiseOnly(None, self.model, 50)
        with mock.patch.object(attack, "pgd", wraps=pgd) as runs:
            x = attack.strong_pgd(model, self.images, self.labels, 0.1, 2, restarts=2, eot=3)
        attack.check_adversarial(x, self.images, 0.1, "linf")
        self.assertEqual([(len(call.args[1]), call.kwargs["loss"], call.kwargs["eot"])
                          for call in runs.call_args_list],
                         [(6, loss, 3) for loss in ("ce", "margin", "ce", "margin")])

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

    def test_under_inference_mode(self):
        """The caller's mode is left for the attack; images and labels may have been made in it."""
        settings = dict(eps=0.1, steps=2, restarts=2, eot=2, early_stop=True, targets=self.labels.flip(0))
        expected = seeded(lambda: pgd(self.model, self.images, self.labels, **settings))
        with torch.inference_mode():
            made_inside = {name: value.clone() if torch.is_tensor(value) else value
                           for name, value in settings.items()}
            actual = seeded(lambda: pgd(self.model, self.images.clone(), self.labels.clone(), **made_inside))
            self.assertTrue(torch.is_inference_mode_enabled())
        assert_near(actual, expected)
        self.assertFalse(actual.is_inference())

    def test_precision(self):
        """Nothing is float64 where the images are not: Apple's GPU has none."""
        made = []

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, arguments=(), settings=None):
                result = function(*arguments, **(settings or {}))
                for value in result if isinstance(result, (tuple, list)) else [result]:
                    if torch.is_tensor(value) and value.dtype == torch.float64:
                        made.append(function)
                return result
        defense = De3(small_autoencoder(), self.model, "gamma:25,3", votes=2)
        with Watch():
            for norm in ("linf", "l2"):
                x = pgd(self.model, self.images, self.labels, 0.1, 5, norm=norm, restarts=2, eot=2,
                        early_stop=True)
            share = attack.accuracy(self.model, x, self.labels, 3)
            best = attack.strongest(self.model, [x, self.images], self.labels)
            defense(x)
            attack.check_adversarial(x, self.images, 5, "l2")
        self.assertEqual(made, [])
        self.assertEqual((share.dtype, best.dtype), (torch.float32, torch.float32))


    def test_scored_in_float32(self):
        """Also where the attack computes in bfloat16, whose rounding would decide close calls."""
        dtypes = []
        hook = self.model.register_forward_hook(lambda module, x, logits: dtypes.append(logits.dtype))
        self.addCleanup(hook.remove)
        with torch.autocast("cpu", torch.bfloat16):
            x = pgd(self.model, self.images, self.labels, 0.03, 2)
            self.assertEqual(set(dtypes), {torch.bfloat16})
            dtypes.clear()
            attack.accuracy(self.model, x, self.labels)
        self.assertEqual(set(dtypes), {torch.float32})


class Detached(nn.Module):
    def forward(self, x):
        return Linear((3, 16, 16))(x.detach())


class UnderNoGrad(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            return Linear((3, 16, 16))(x)


class Loud(nn.Module):
    """Logits times a gain; of a large one the cross-entropy underflows."""

    def __init__(self, model, gain):
        super().__init__()
        self.model, self.gain = model, gain

    def forward(self, x):
        return self.gain * self.model(x)


class Blind(nn.Module):
    """Two classes, of which it gives the first; bright images alone have a gradient."""

    def forward(self, x):
        score = x.flatten(1).mean(1)
        score = torch.where(score > 0.5, score, score.detach())
        return torch.stack([torch.ones_like(score), score], dim=1)


class TestPgdWarnings(unittest.TestCase):
    """Attacks that are weaker than they look, and models that PGD cannot attack."""

    def warned(self, *arguments, **settings):
        """(adversarial images, the warnings) of pgd."""
        with warnings.catch_warnings(record=True, action="always") as caught:
            x = seeded(lambda: pgd(*arguments, **settings))
        self.assertTrue(all(warning.filename == __file__ for warning in caught))  # who called pgd
        return x, [str(warning.message) for warning in caught]

    def test_overconfident_model(self):
        """Where the cross-entropy underflows the margin is raised: it attacks as well, and in silence.

        One of the 50 images errs from the start and has a gradient of the cross-entropy.
        """
        plain, (images, labels) = linear_on_digits()
        right = plain(images).argmax(1) == labels
        images = torch.cat([images[right][:49], images[~right][:1]])
        labels = torch.cat([labels[right][:49], labels[~right][:1]])
        model, robust = Loud(plain, 1e4), {}
        own = F.cross_entropy(model(images), labels, reduction="none")
        self.assertEqual((own == 0).sum(), 49)
        for norm, eps in (("linf", 0.1), ("l2", 2.0)):
            for loss in ("ce", "margin"):
                with self.subTest(norm=norm, loss=loss):
                    x, said = self.warned(model, images, labels, eps, 20, norm=norm, loss=loss)
                    robust[loss] = attack.accuracy(model, x, labels).mean().item()
                    self.assertEqual(said, [])
            self.assertLess(robust["margin"], 0.5)
            self.assertAlmostEqual(robust["ce"], robust["margin"], delta=0.05)

    def test_cross_entropy(self):
        """As torch's where it is above 0, with its gradient; the margin, with its own, where it is not."""
        logits = torch.tensor([[1., 4., 3.], [500., 2., -1.], [0., 900., 8.]], requires_grad=True)
        labels = torch.tensor([1, 0, 0])
        loss = attack.cross_entropy(logits, labels)
        usual = F.cross_entropy(logits, labels, reduction="none")
        assert_near(loss, torch.stack([usual[0], torch.tensor(-498.0), usual[2]]))
        gradient, = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        expected, = torch.autograd.grad(usual.sum(), logits)
        assert_near(gradient[[0, 2]], expected[[0, 2]])
        assert_near(gradient[1], torch.tensor([-1.0, 1.0, 0.0]))

    def test_gradient_that_is_nearly_zero(self):
        """Between the gains 1 and 1e4, too, where the cross-entropy's gradient is just above 0."""
        model, labels = Linear((3, 8, 8)), torch.zeros(20, dtype=torch.long)
        images = random_images(20, 3, 8, 8, low=0.4, high=0.6)
        with torch.no_grad():
            scores = model(images)[:, 1]
        for margin in (20, 60, 75, 90, 100):
            for norm, eps in (("linf", 0.02), ("l2", 0.2)):
                with self.subTest(margin=margin, norm=norm):
                    gains = {}
                    for loss in ("ce", "margin"):
                        shifted = Linear((3, 8, 8), bias=-margin - scores.max().item())
                        x, _ = self.warned(shifted, images, labels, eps, 10, norm=norm, loss=loss,
                                           random_start=False)
                        gains[loss] = model(x)[:, 1] - scores
                    assert_near(gains["ce"], gains["margin"], atol=0.01, rtol=0.02)

    def test_masked_gradients(self):
        """The warning says how many images were not attacked; none for those that err from the start."""
        labels, bright = torch.zeros(4, dtype=torch.long), 0.5 * (torch.arange(4) >= 1).float()
        images = random_images(high=0.4) + bright.view(-1, 1, 1, 1)
        for chosen, number in ((slice(0, 4), "1 of 4"), (slice(0, 1), "1 of 1"), ([0, 0, 0], "3 of 3")):
            for loss in ("ce", "margin"):
                x, said = self.warned(Blind(), images[chosen], labels[chosen], 0.1, 2, loss=loss)
                self.assertEqual(len(said), 1, said)
                self.assertIn(f"{number} images", said[0])
                self.assertIn("masks", said[0])
        for classes in (labels, labels + 1):  # all see, or all err
            chosen = slice(1, 4) if classes is labels else slice(0, 4)
            self.assertEqual(self.warned(Blind(), images[chosen], classes[chosen], 0.1, 2)[1], [])

    def test_walk_that_is_too_short(self):
        """From a random start it has to cross the ball, else to reach its edge."""
        images, labels, model = random_images(), torch.arange(4), small_classifier()
        for steps, step_size, random_start, weak in [
                (3, 1 / 255, True, True), (32, 1 / 255, True, False), (31, 1 / 255, True, True),
                (16, 1 / 255, False, False), (15, 1 / 255, False, True), (1, None, True, False),
                (1, 16 / 255, False, False), (1, 16 / 255, True, True)]:
            with self.subTest(steps=steps, step_size=step_size, random_start=random_start):
                _, said = self.warned(model, images, labels, 16 / 255, steps, step_size,
                                      random_start=random_start)
                self.assertEqual(len(said), weak, said)
                for text in said:
                    self.assertIn(f"{steps} steps of {255 * (step_size or 0):.4g}/255 cannot cross the ball "
                                  "of radius 16/255", text)

    def test_lengths_of_l2(self):
        """Are said as lengths over all pixels."""
        images, labels, model = random_images(), torch.arange(4), small_classifier()
        _, (said,) = self.warned(model, images, labels, 1.0, 2, 0.1, norm="l2")
        self.assertIn("2 steps of 0.1 cannot cross the ball of radius 1:", said)
        _, (said,) = self.warned(model, images, labels, 0.5, 2, 1.25, norm="l2")
        self.assertIn("steps of 1.25 each cross the whole ball of radius 0.5:", said)

    def test_steps_that_are_too_large(self):
        """2 for 2/255: from corner to corner of the ball."""
        images, labels = random_images(4, 3, 4, 4, low=0.3, high=0.7), torch.zeros(4, dtype=torch.long)
        for steps, step_size, warned in ((20, 2.0, True), (20, 8 / 255, False), (2, None, False),
                                         (1, 1.0, False)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pgd(Linear(), images, labels, 8 / 255, steps, step_size)
            self.assertEqual(any("510/255" in str(one.message) for one in caught), warned)

    def test_training_mode(self):
        """Batch norm, dropout, drop path act in it: said; without them a model is the same in both."""
        images, labels = random_images(), torch.arange(4)
        resnet = make_classifier("resnet18", num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
        dropout = nn.Sequential(nn.Dropout(0.3), nn.Flatten())
        no_dropout = nn.Sequential(nn.Dropout(0.0), nn.Flatten())
        drop_path = small_classifier(drop_path=0.3)
        behind = De3(small_autoencoder(), dropout, 0)
        for model, acts in [(resnet, True), (dropout, True), (no_dropout, False), (drop_path, True),
                            (small_classifier(), False), (behind, True)]:
            for training in (True, False):
                _, said = self.warned(model.train(training), images, labels, 0.1, 1)
                found = ["training mode" in text for text in said]
                self.assertEqual(any(found), acts and training, (model, said))

    def test_models_that_cannot_be_attacked(self):
        images, labels = random_images(), torch.zeros(4, dtype=torch.long)
        for model in (Detached(), UnderNoGrad()):
            with self.subTest(type(model).__name__), self.assertRaisesRegex(UserError, "no gradient"):
                pgd(model, images, labels, 0.1, 1)

    def test_gradient_that_is_not_finite(self):
        with self.assertRaisesRegex(UserError, "finite"):
            pgd(Loud(Linear((3, 16, 16)), float("nan")), random_images(), torch.zeros(4).long(), 0.1, 1)


class TestNeedsEot(unittest.TestCase):
    def test_random_model(self):
        """A model says so, it draws a number, or two calls on the images differ by more than rounding."""
        class Changes(nn.Module):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return x.flatten(1) + self.amount * self.calls
        model, images = Changes(), random_images()
        for model.amount, expected in ((0.1, True), (1e-6, False), (0.0, False)):
            self.assertEqual(attack.needs_eot(model, images), expected)
        for draw in (torch.rand, lambda size: np.random.rand(), lambda size: random.random()):
            self.assertTrue(attack.needs_eot(lambda x: x.flatten(1) + 1e-9 * draw(1), images))
        for sigma in (0, 50):
            self.assertEqual(attack.needs_eot(NoiseOnly(None, nn.Flatten(), sigma), images), sigma == 50)
        self.assertTrue(attack.needs_eot(nn.Sequential(nn.Dropout(0.5), nn.Flatten()), images))

    def test_strongest_of_a_random_model(self):
        """One that denies being random is judged on several draws as well."""
        class Denies(nn.Module):
            is_random, calls = False, 0

            def forward(self, x):
                self.calls += 1
                return torch.randn(len(x), 2)
        model, images = Denies(), random_images()
        attack.strongest(model, [images, images], torch.zeros(4, dtype=torch.long))
        self.assertGreaterEqual(model.calls, 20)
