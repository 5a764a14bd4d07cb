"""What a person is shown: intervals, tables of measurements, and sheets of captioned pictures."""

import csv
from statistics import NormalDist
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from model import UserError
from support import cli, run

CELL, GAP, TEXT = 112, 6, 15  # pixels: side of an image, space between, height of the letters
WRONG = "#c1121f"  # red that stays dark in gray
UNREADABLE = "surrogateescape"  # bytes in the names of folders that are no UTF-8 are kept as they are
OTHER_COLUMNS = "{} is a table with other columns: move it away, or name another folder with --out"


def interval(percent, images):
    """95% Wilson interval of an accuracy in percent, as text."""
    z, p = NormalDist().inv_cdf(0.975), percent / 100
    center = p + z**2 / (2 * images)
    width = z * (p * (1 - p) / images + z**2 / 4 / images**2) ** 0.5
    low, high = (100 * (center + sign * width) / (1 + z**2 / images) for sign in (-1, 1))
    low = max(low, 0.0)  # of no image rounding can make it -0.0
    return f"{percent:5.1f} [{low:4.1f}, {high:5.1f}]"


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB of each image: [B]."""
    error = (images - reference).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def append_row(path, row):
    """Add a row, a dict, to a CSV file, in the process of rank 0; UserError for a file with other columns."""
    if cli.rank() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with run.patiently(lambda: open(path, "a+", newline="", encoding="utf-8", errors=UNREADABLE)) as file:
        file.seek(0)
        text = file.read().removeprefix("\ufeff")  # a spreadsheet may have put a mark in front
        columns = next(csv.reader(text.splitlines()), None)
        if columns not in (None, list(row)):
            raise UserError(OTHER_COLUMNS.format(path))
        table = csv.DictWriter(file, list(row))
        if columns is None:
            table.writeheader()
        elif not text.endswith("\n"):  # an editor may leave the last line open
            file.write("\n")
        table.writerow(row)


def read_rows(path):
    """The rows of a CSV file, dicts of text, as rank 0 sees it; none where there is no file."""
    rows = []
    if cli.rank() == 0 and path.exists():
        encoding = "utf-8-sig"  # a spreadsheet may have put a mark in front
        with open(path, newline="", encoding=encoding, errors=UNREADABLE) as file:
            rows = list(csv.DictReader(file, restval=""))
    return cli.of_rank_0(rows)  # all processes must agree on what is measured already


def find_row(rows, what, path):
    """The row that says the same in all these columns, {column: value}: what was measured before, or None.

    path: the table that the rows are of. UserError, before anything is measured, if it lacks a column.
    """
    wanted = {name: as_text(value) for name, value in what.items()}
    if rows and not wanted.keys() <= rows[0].keys():
        raise UserError(OTHER_COLUMNS.format(path))
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


def as_text(value):
    """A value as it stands in a CSV file."""
    return "" if value is None else str(value)


# ------------------------------------------------------------------------------------- pictures

class Row(NamedTuple):
    """A row of a sheet: its title, images [N, 3, H, W], a caption under each, in red where wrong."""
    title: str
    images: torch.Tensor
    captions: list
    wrong: list


def fitting(text, font, width=None):
    """The text in letters that Pillow's font has (Latin-1), cut where it is wider than so many pixels."""
    text = text.replace("σ", "sigma").replace("³", "3").encode("latin-1", "replace").decode("latin-1")
    while width is not None and font.getlength(text) > width:
        text = text[:-1]
    return text


def draw_sheet(path, heading, columns, rows):
    """Write a PNG: a heading, the titles of the columns, then the rows with theirs at the left."""
    font = ImageFont.load_default(TEXT)
    heading = fitting(heading, font)
    rows = [row._replace(title=fitting(row.title, font)) for row in rows]
    left = 12 + max(int(font.getlength(line)) for row in rows for line in row.title.split("\n"))
    height = CELL + TEXT + 2 * GAP
    top = (TEXT + 4) * (heading.count("\n") + 2) + 2 * GAP
    longest_line = max(int(font.getlength(line)) for line in heading.split("\n"))
    width = max(left + len(rows[0].images) * (CELL + GAP), longest_line + 2 * GAP)
    sheet = Image.new("RGB", (width, top + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), heading, fill="black", font=font)
    for column, title in enumerate(columns):
        draw.text((left + column * (CELL + GAP), top - TEXT - 4), fitting(title, font, CELL),
                  fill="black", font=font)
    for row in rows:
        draw.multiline_text((GAP, top + CELL // 3), row.title, fill="black", font=font)
        for column, image in enumerate(row.images.clamp(0, 1).float().cpu()):
            x = left + column * (CELL + GAP)
            sheet.paste(to_pil_image(image).resize((CELL, CELL), Image.NEAREST), (x, top))
            draw.text((x, top + CELL), fitting(row.captions[column], font, CELL), font=font,
                      fill=WRONG if row.wrong[column] else "black")
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")
