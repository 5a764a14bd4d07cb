"""What a person is shown: intervals, tables of measurements, and sheets of captioned pictures."""

import csv
import io
from statistics import NormalDist
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from model import UserError
from support import cli, data, run, training

CELL, GAP, TEXT = 112, 6, 15  # pixels: side of an image, space between, height of the letters
WRONG = "#c1121f"  # red that stays dark in gray


def interval(percent, images):
    """95% Wilson interval of an accuracy in percent, as text."""
    z, p = NormalDist().inv_cdf(0.975), percent / 100
    center = p + z**2 / (2 * images)
    width = z * (p * (1 - p) / images + z**2 / 4 / images**2) ** 0.5
    low, high = (100 * (center + sign * width) / (1 + z**2 / images) for sign in (-1, 1))
    return f"{percent:5.1f} [{low:4.1f}, {high:5.1f}]"


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB of each image: [B]."""
    error = (images - reference).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


# -------------------------------------------------------------------------- tables in CSV files

def read_table(path, numbers=()):
    """The rows of a CSV file, dicts of text; none where there is no file.

    A column that a row lacks is empty. numbers: columns that hold a number, or nothing. Raises
    UserError for what is no such table, and says where.
    """
    if not path.exists():
        return []
    try:
        # a spreadsheet program puts a mark in front, and names of files need not be text
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        table = csv.DictReader(io.StringIO(text), strict=True, restval="")
        if text and (table.fieldnames is None or len(table.fieldnames) < 2):
            raise csv.Error("its columns must be separated by commas")
        rows = list(table)
        for row in rows:
            if None in row:
                raise csv.Error(f"a row has more fields than the heading: {row[None]}")
            for name in numbers:
                float(row.get(name) or 0)
    except (ValueError, csv.Error) as error:  # no UTF-8, or no number
        raise UserError(f"{path} is not a table that can be read ({error}): repair it, or move it "
                        "away") from None
    return rows


def write_table(path, columns, rows):
    """Write dicts as a CSV file, whole; a column that a row lacks stays empty."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(rows)
    run.write_whole(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))


def open_table(path):
    """The path of a table; UserError, before hours of work, where it cannot be read or written."""
    run.take_lock(path.with_name(f".{path.name}.lock"), wait=True).close()
    read_table(path)
    return path


def append_row(path, row):
    """Add a row to a table, in the process of rank 0; new columns are put behind the old ones."""
    if cli.rank() > 0:
        return
    with run.take_lock(path.with_name(f".{path.name}.lock"), wait=True):
        rows = read_table(path)
        columns = list(dict.fromkeys([name for old in [*rows[:1], row] for name in old]))
        write_table(path, columns, [*rows, row])


# ------------------------------------------------------------------------------------- pictures

class Row(NamedTuple):
    """A row of a sheet: its title, images [N, 3, H, W], a caption under each, in red where wrong."""
    title: str
    images: torch.Tensor
    captions: list
    wrong: list


def load_font():
    """Pillow's own font; before Pillow 10.1 it has one size only."""
    try:
        return ImageFont.load_default(TEXT)
    except TypeError:
        return ImageFont.load_default()


def printable(text):
    """The text in letters that the font has: Latin-1, without the ³ of De³."""
    return text.replace("σ", "sigma").replace("³", "3").encode("latin-1", "replace").decode("latin-1")


def shorten(text, font, width):
    """The text, cut with an ellipsis where it is wider than so many pixels."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def draw_sheet(path, heading, columns, rows):
    """Write a PNG: a heading, the titles of the columns, then the rows with theirs at the left."""
    font, heading = load_font(), printable(heading)
    rows = [row._replace(title=printable(row.title)) for row in rows]
    left = 12 + max(int(font.getlength(line)) for row in rows for line in row.title.split("\n"))
    height = CELL + TEXT + 2 * GAP
    top = (TEXT + 4) * (heading.count("\n") + 2) + 2 * GAP
    longest_line = max(int(font.getlength(line)) for line in heading.split("\n"))
    width = max(left + len(rows[0].images) * (CELL + GAP), longest_line + 2 * GAP)
    sheet = Image.new("RGB", (width, top + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), heading, fill="black", font=font)
    for column, title in enumerate(columns):
        draw.text((left + column * (CELL + GAP), top - TEXT - 4), shorten(title, font, CELL),
                  fill="black", font=font)
    for row in rows:
        draw.multiline_text((GAP, top + CELL // 3), row.title, fill="black", font=font)
        for column, image in enumerate(row.images.clamp(0, 1).float().cpu()):
            x = left + column * (CELL + GAP)
            sheet.paste(to_pil_image(image).resize((CELL, CELL), Image.NEAREST), (x, top))
            draw.text((x, top + CELL), shorten(row.captions[column], font, CELL), font=font,
                      fill=WRONG if row.wrong[column] else "black")
        top += height
    run.write_whole(path, lambda file: sheet.save(file, "png"))
    print(f"wrote {path}")


# ---------------------------------------------------------------------- what a training reached

@torch.no_grad()
def show_finetuning(mode, model, heldout, seed, epochs, device):
    """Print the accuracy of a model on held-out images, seen as in training."""
    model.eval()
    training.seed_epoch(seed, epochs)
    hits = sum((model(images).argmax(1) == labels).sum().item()
               for images, labels in data.Loader(heldout, 250, device=device))
    hits, images = cli.sum_over_processes(hits, len(heldout))
    level = f" at {model.level}" if hasattr(model, "level") else ""
    print(f"{mode}{level}: {100 * hits / images:.1f}% of {images:.0f} validation images")


@torch.no_grad()
def show_pretraining(path, defenses, heldout, seed, epochs, device):
    """What pretraining reached: PSNR on held-out images of each step of these defenses, as a table,
    and one image at each of their levels as a picture, pretrain.png."""
    print("\nPSNR in dB")
    for defense in defenses:
        training.seed_epoch(seed, epochs)
        sums = {}
        for images, _ in data.Loader(heldout, 250, device=device):
            for name, made in defense.steps(images).items():
                sums[name] = sums.get(name, 0.0) + psnr(made, images).sum().item()
        count, *totals = cli.sum_over_processes(len(heldout), *sums.values())
        print(f"{defense.level:>24}  "
              + "  ".join(f"{name} {total / count:5.2f}" for name, total in zip(sums, totals)))
    if cli.rank() > 0:
        return
    torch.manual_seed(seed)
    few, _ = next(iter(data.Loader(heldout, 10, device=device)))
    clean = few[-1:]
    made = [defense.steps(clean) for defense in defenses]
    no_captions = [""] * len(defenses)
    rows = [Row("clean", clean.expand(len(defenses), -1, -1, -1), no_captions, [False] * len(defenses))]
    for name in made[0]:
        pictured = torch.cat([steps[name] for steps in made]).clamp(0, 1)
        captions = [f"{value:.1f} dB" for value in psnr(pictured, clean).tolist()]
        rows.append(Row(name, pictured, captions, [False] * len(defenses)))
    draw_sheet(path, "A held-out image; under it the PSNR to the clean one",
               [defense.level for defense in defenses], rows)
