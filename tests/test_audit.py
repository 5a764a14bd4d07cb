"""The audit of an attack: it passes an honest defense and catches one that hides its gradients."""

import unittest
import warnings
from unittest import mock

import torch
from torch import nn

from attack import accuracy, check_adversarial
from model import De3, NoiseOnly, UserError, add_noise
from studies import audit
from support import run as run_module
from tests.helpers import (Linear, assert_near, assert_refused, digits_runs, linear_on_digits,
                           random_images, run, seeded)


class Quantizes(NoiseOnly):
    """Leaves no gradient."""

    def purify(self, images):
        return (super().purify(images) * 4).round().clamp(0, 4) / 4


class DrownsGradients(NoiseOnly):
    """Adds noise that is large only while gradients are taken."""

    def purify(self, images):
        return add_noise(images, 2000 if torch.is_grad_enabled() else 20)


class Shatters(NoiseOnly):
    """A ripple too small to see, and steep enough to drown the slope of the loss."""

    def purify(self, images):
        return super().purify(images + 1e-4 * torch.sin(2e4 * images))


class NoisyBackward(torch.autograd.Function):
    """The identity; its gradient comes with random noise of eight times its own size."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 8 * gradient.std() * torch.randn_like(gradient)


class AddsNoiseToGradients(NoiseOnly):
    def purify(self, images):
        return super().purify(NoisyBackward.apply(images))


class Loud(NoiseOnly):
    """Logits times 1000: the cross-entropy saturates, and has no gradient of its own."""

    def forward(self, images):
        return 1000 * super().forward(images)


class TestAudit(unittest.TestCase):
    def suspicious(self, kind, queries=2):
        """The checks that a defense of this kind does not pass; the other model is its classifier.

        queries: of the gradient-free attack; few, where its result does not matter.
        """
        model, (images, labels) = linear_on_digits()
        defense, others = kind(None, model, 20), [model]
        with mock.patch.object(audit, "QUERIES", queries), warnings.catch_warnings(action="ignore"):
            checks = seeded(lambda: audit.audit(defense, images[:50], labels[:50], 0.05, 10, 2, 5, 400,
                                                others))
        return [name for name, figures, holds in checks if not holds]

    def short_search(self):
        """Makes the gradient-free attack one of few queries, where its result does not matter."""
        return mock.patch.object(audit, "QUERIES", 2)

    def assert_found(self, beginning, found):
        self.assertTrue(any(name.startswith(beginning) for name in found), found)

    def test_honest(self):
        self.assertEqual(self.suspicious(NoiseOnly, audit.QUERIES), [])

    def test_honest_de3(self):
        """Noise, autoencoder and classifier as the stages make them."""
        folder, _ = digits_runs()
        autoencoder, _ = run_module.load(folder / "nim", "autoencoder")
        classifier, _ = run_module.load(folder / "de3", "classifier")
        _, (images, labels) = linear_on_digits()
        with self.short_search():
            checks = seeded(lambda: audit.audit(De3(autoencoder, classifier, 50), images[:25],
                                                labels[:25], 16 / 255, 5, 1, 2, 400))
        self.assertEqual([name for name, figures, holds in checks if not holds], [])

    def test_quantizes(self):
        found = self.suspicious(Quantizes)
        for name in ("under 5% of the input gradients are zero or not finite",
                     "gray-box is no stronger than white-box", "the gradient predicts the loss",
                     "images that fool another model (1) are no stronger"):
            self.assert_found(name, found)

    def test_noise_under_gradients(self):
        found = self.suspicious(DrownsGradients)
        self.assert_found("accuracy is the same while gradients are taken", found)
        self.assert_found("the gradient predicts the loss", found)

    def test_shattered_gradients(self):
        self.assert_found("the gradient predicts the loss", self.suspicious(Shatters))

    def test_noise_added_to_gradients(self):
        self.assert_found("the gradient predicts the loss", self.suspicious(AddsNoiseToGradients))

    def test_saturated_logits(self):
        """Where the cross-entropy underflows the margin is raised: its gradients are not gone."""
        self.assertEqual(self.suspicious(Loud), [])

    def test_first_check_alone(self):
        """It tells the tricks from the honest model, with noise and without."""
        model, (images, labels) = linear_on_digits()
        for kind, low, high in ((NoiseOnly, 0.8, 1.2), (Shatters, -0.5, 0.4),
                                (AddsNoiseToGradients, -0.2, 0.2)):
            for sigma in (0, 20):
                gains = seeded(lambda: audit.predicted_and_actual_gain(kind(None, model, sigma), images,
                                                                       labels)).mean(0)
                self.assertTrue(low < gains[1] / gains[0] < high, (kind, sigma, gains))

    def test_gain(self):
        """Of a linear model the gradient predicts the gain exactly; of a quantized one nothing."""
        images, labels = random_images(4, 3, 4, 4, low=0.3, high=0.7), torch.zeros(4, dtype=torch.long)
        for kind, expected in ((NoiseOnly, Linear().w.abs().sum() / 255),
                               (Quantizes, torch.tensor(0.0))):
            defense = kind(None, Linear(), 0)
            predicted, _ = pair = audit.predicted_and_actual_gain(defense, images, labels).T
            assert_near(predicted, expected.expand(4), atol=1e-4)
            if kind is NoiseOnly:
                assert_near(*pair, atol=1e-4)

    def test_search_without_gradients(self):
        """Stays in the ball, and errs more the longer it searches."""
        model, (images, labels) = linear_on_digits()
        images, labels, rates = images[:50], labels[:50], []
        for queries in (0, 60, 240):
            x = seeded(lambda: audit.square_search(model, images, labels, 0.05, queries, draws=1))
            check_adversarial(x, images, 0.05, "linf")
            rates.append(accuracy(model, x, labels, 1).mean().item())
        self.assertGreater(rates[0], rates[1])
        self.assertGreater(rates[1], rates[2])
        self.assertLess(rates[2], rates[0] - 0.1)

    def test_search_on_images_that_are_not_square(self):
        model, shape = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 8, 2)), (2, 3, 24, 8)
        images, labels = random_images(*shape), torch.tensor([0, 1])
        for x in (images, images.transpose(2, 3).contiguous()):
            check_adversarial(audit.square_search(model, x, labels, 0.05, 20), x, 0.05, "linf")

    def test_large_data_in_batches(self):
        """No model sees more than max_batch images at once."""
        model, (images, labels) = linear_on_digits()
        defense, sizes = NoiseOnly(None, model, 20), []
        hook = model.register_forward_pre_hook(lambda module, x: sizes.append(len(x[0])))
        self.addCleanup(hook.remove)
        with self.short_search():
            audit.audit(defense, images[:20], labels[:20], 0.05, 1, 2, 1, 8)
        self.assertLessEqual(max(sizes), 8)

    def test_exit_code(self):
        """1 if anything is suspicious; each check is shown as soon as it is done."""
        flags = self.few_images()
        for holds, code in ((True, 0), (False, 1)):
            checks = [("a check", "1.0", holds), ("another", "1.0", True)]

            def audited(*arguments):
                *_, show, norm = arguments
                self.assertEqual(norm, "linf")
                for check in checks:
                    show(*check)
                return checks
            with mock.patch.object(audit, "audit", audited):
                result = run("studies.audit", *flags)
            self.assertEqual((result.code, "SUSPICIOUS  a check: 1.0\n" in result.out), (code, not holds))
            self.assertIn("holds       another: 1.0\n", result.out)

    def test_l2(self):
        """All but the search, which is one of L∞; the images stay in the L2 ball, which pgd's check tells."""
        defense, (images, labels) = linear_on_digits()
        with self.short_search():
            in_linf, in_l2 = (
                [check[0] for check in audit.audit(defense, images[:12], labels[:12], eps, 2, 1, 1, 400, norm=norm)]
                for norm, eps in (("linf", 0.05), ("l2", 1.0)))
        left_out = set(in_linf) - set(in_l2)
        self.assertEqual(len(left_out), 1)
        self.assertIn("gradient-free", left_out.pop())
        self.assertTrue(set(in_l2) <= set(in_linf))
        assert_refused(run("studies.audit", *self.few_images(), "--norm", "l2"), "needs --eps")

    def few_images(self):
        """Flags of a short audit of De³ on the digits, of fewer images than are of use."""
        patch = mock.patch.object(audit, "FEWEST_IMAGES", 6)
        patch.start()
        self.addCleanup(patch.stop)
        folder, _ = digits_runs()
        return (folder / "clean", folder / "de3", "--images", 6, "--draws", 1, "--steps", 1, "--eot", 1)

    def test_script(self):
        """Audits De³ at its largest default sigma, with images that fool the undefended classifier."""
        with self.short_search():
            result = run("studies.audit", *self.few_images())
        first, *lines = result.out.splitlines()
        folder, _ = digits_runs()
        self.assertIn(f"audit of de3, σ = 50 ({folder / 'de3'}): 6 test images", first)
        self.assertIn(f"transfer from {folder / 'clean'}", first)
        for name in ("random noise of this eps", r"images that fool another model \(1\)",
                     "the clamp's own gradient", "gray-box is no stronger", "ten votes"):
            self.assertRegex(result.out, rf"\n(holds|SUSPICIOUS) +{name}")
        self.assertEqual(result.code, int("SUSPICIOUS" in result.out))

    def test_any_model(self):
        """A classifier has no clamp, no votes, no gray-box and no draws: the other checks are made."""
        model, (images, labels) = linear_on_digits()
        with self.short_search():
            checks = audit.audit(model, images[:20], labels[:20], 0.05, 1, 1, 1, 400)
        names = " ".join(name for name, _, _ in checks)
        for part in ("gray-box", "clamp", "votes", "another model", "EOT"):
            self.assertNotIn(part, names)
        self.assertEqual(len(checks), 11)

    def test_nothing_is_random(self):
        """Where nothing is drawn, EOT, draws and votes are not used, whatever is asked for."""
        model, (images, labels) = linear_on_digits()
        names, calls = {}, []
        for sigma in (0, 20):
            with self.short_search(), mock.patch.object(audit, "pgd", wraps=audit.pgd) as attacks:
                checks = audit.audit(NoiseOnly(None, model, sigma), images[:20], labels[:20], 0.05, 1, 3, 2,
                                     400)
            names[sigma] = [name for name, _, _ in checks]
            calls.append({call.kwargs["eot"] for call in attacks.call_args_list})
        self.assertEqual([name.split(",")[0] for name in names[20] if name not in names[0]],
                         ["twice the EOT draws change nothing", "ten votes"])
        self.assertEqual(calls, [{1}, {1, 3, 6}])

    def test_cannot_be_differentiated(self):
        """A sentence, where a model detaches its input."""
        images, labels = random_images(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
        linear = Linear()
        with self.assertRaisesRegex(UserError, "no gradient"):
            audit.audit(lambda x: linear(x.detach()), images, labels, 8 / 255, 2, 1, 1, 4)

    def test_refuses(self):
        """Settings under which its figures would say nothing, and those that it does not have."""
        clean = digits_runs()[0] / "clean"
        assert_refused(run("studies.audit", clean, "--images", 89), ("89", "--images 90"))
        for extra in (["--norm", "l2"], ["--threat", "gray"], ["--votes", "2"], ["--eps", "nan"],
                      ["--eps", "8"]):
            assert_refused(run("studies.audit", clean, *extra), extra[1])


if __name__ == "__main__":
    unittest.main()
