"""Sheets of captioned images, drawn with Pillow, and the PSNR that stands in their captions."""

from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from model import De3, add_noise, unpatchify
from support import cli, data, files, training

CELL, GAP, TEXT = 112, 6, 15  # pixels: side of an image, space between, height of the letters
WRONG = "#c1121f"  # red that stays dark in gray


class Row(NamedTuple):
    """A row of a sheet: its title, images [N, 3, H, W], a caption under each, in red where wrong."""
    title: str
    images: torch.Tensor
    captions: list
    wrong: list


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB of each image: [B]."""
    error = (images - reference).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def print_psnr(autoencoder, args, heldout, levels, device):
    """A table: PSNR on held-out images of what goes in and of what comes out, level by level.

    args: pretrain.py's. levels: sigmas for NIM, mask ratios for MIM.
    """
    nim = args.task == "nim"
    print("\nsigma  noisy dB  denoised dB" if nim else
          "\nmask ratio  filled in dB (visible patches kept)")
    for level in levels:
        defense = De3(autoencoder, None, level) if nim else De3(
            autoencoder, None, None, mask_ratio=level, keep_visible=True)
        training.seed_epoch(args.seed, args.epochs)
        before = after = 0
        for images, _ in data.Loader(heldout, 250, args.workers, device):
            with torch.no_grad():
                if nim:
                    before += psnr(add_noise(images, level), images).sum().item()
                after += psnr(defense.purify(images), images).sum().item()
        count, before, after = cli.sum_over_processes(len(heldout), before, after)
        if nim:
            print(f"{level:5g}  {before / count:8.2f}  {after / count:11.2f}")
        else:
            print(f"{level:10g}  {after / count:12.2f}")
    if args.norm_pix:
        print("(--norm-pix: each patch has the mean and sd of the clean image's back)")


def draw_sheet(path, heading, columns, rows):
    """Write a PNG: a heading, the titles of the columns, then the rows with theirs at the left."""
    font = ImageFont.load_default(TEXT)
    left = 12 + max(int(font.getlength(line)) for row in rows for line in row.title.split("\n"))
    height = CELL + TEXT + 2 * GAP
    top = (TEXT + 4) * (heading.count("\n") + 2) + 2 * GAP
    longest_line = max(int(font.getlength(line)) for line in heading.split("\n"))
    width = max(left + len(rows[0].images) * (CELL + GAP), longest_line + 2 * GAP)
    sheet = Image.new("RGB", (width, top + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), heading, fill="black", font=font)
    for column, title in enumerate(columns):
        draw.text((left + column * (CELL + GAP), top - TEXT - 4), title, fill="black", font=font)
    for row in rows:
        draw.multiline_text((GAP, top + CELL // 3), row.title, fill="black", font=font)
        for column, image in enumerate(row.images.clamp(0, 1).cpu()):
            x = left + column * (CELL + GAP)
            sheet.paste(to_pil_image(image).resize((CELL, CELL), Image.NEAREST), (x, top))
            draw.text((x, top + CELL), row.captions[column], font=font,
                      fill=WRONG if row.wrong[column] else "black")
        top += height
    files.write_whole(path, lambda file: sheet.save(file, "png"))
    print(f"wrote {path}")


@torch.no_grad()
def draw_pretraining(path, autoencoder, image, levels, nim, seed):
    """pretrain.png, from one image [1, 3, H, W]: clean, noisy and denoised, at each level of sigma.

    For MIM: clean, masked and filled in, at each mask ratio. Under each image stands its PSNR.
    """
    torch.manual_seed(seed)
    clean = image.repeat(len(levels), 1, 1, 1)
    if nim:
        before = add_noise(clean, torch.tensor(levels))
        after = autoencoder.reconstruct(before, clean)
    else:
        before, after = clean.clone(), clean.clone()
        for i, ratio in enumerate(levels):
            _, prediction, mask = autoencoder.mim(image, ratio)
            pixels = mask[:, :, None].expand_as(prediction)
            dropped = unpatchify(pixels, autoencoder.patch_size)[0] == 1  # [3, H, W]
            filled = autoencoder.to_images(prediction, image)[0]
            before[i] = torch.where(dropped, 0.5, image[0])
            after[i] = torch.where(dropped, filled, image[0])
    before, after = before.clamp(0, 1), after.clamp(0, 1)
    names = ("clean", "noisy", "denoised") if nim else ("clean", "masked", "filled in")
    rows = [Row(names[0], clean, [""] * len(levels), wrong=[False] * len(levels))]
    for name, pictured in zip(names[1:], (before, after)):
        decibels = [f"{value:.1f} dB" for value in psnr(pictured, clean).tolist()]
        rows.append(Row(name, pictured, decibels, wrong=[False] * len(levels)))
    columns = [f"sigma {level}" if nim else f"mask {level:g}" for level in levels]
    draw_sheet(path, "A held-out image; under it the PSNR to the clean one", columns, rows)
