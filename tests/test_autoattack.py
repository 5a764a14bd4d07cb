"""AutoAttack on a random defense: every image is attacked, by both losses, and the stronger version counts.

Its package is not needed: a stand-in notes what it is asked for.
"""

import types
import unittest

import torch

from studies import autoattack
from tests.helpers import assert_refused, random_images, run


class Brightness(torch.nn.Module):
    """Two classes, by the mean of the image: the brighter, the surer of class 1."""

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)


class TestAutoAttack(unittest.TestCase):
    def test_every_image_by_both_losses(self):
        """Also those that are wrong already; "ce" makes class 0 surer here, "dlr" class 1."""
        images, calls = random_images(6, 3, 4, 4, low=0.4, high=0.6), []
        labels = torch.tensor([0, 1, 0, 1, 0, 1])

        def perturb(x, y, best_loss):
            calls.append((apgd.loss, len(x), best_loss))
            return x + (0.3 if apgd.loss == "dlr" else -0.3)
        apgd = types.SimpleNamespace(perturb=perturb, loss="")
        attack = types.SimpleNamespace(version="rand", model=Brightness(), apgd=apgd)
        made = autoattack.attacked_by(attack, images, labels, batch_size=4)
        self.assertEqual(calls, [("ce", 4, True), ("dlr", 4, True), ("ce", 2, True), ("dlr", 2, True)])
        changes = torch.tensor([0.3, -0.3, 0.3, -0.3, 0.3, -0.3])  # towards the other class
        self.assertTrue(torch.equal(made, images + changes.view(-1, 1, 1, 1)))

    def test_computes_in_float32(self):
        assert_refused(run("studies.autoattack", "assets/digits/de3", "--bf16"), "--bf16 changes nothing here")


if __name__ == "__main__":
    unittest.main()
