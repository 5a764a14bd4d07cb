"""Files: results are written whole, tables read back with care, and locks keep two processes apart."""

import contextlib
import csv
import io
import os
import tempfile
import uuid

from model import UserError

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two processes apart
    fcntl = None

HELD = {}  # {(process, lock file): its descriptor} of the runs that are trained here


def write_whole(path, save):
    """save(file) beside `path`, then move into place: a kill leaves the old file whole.

    Each writer has a temporary file of its own. Raises UserError where the folder or the disk fails.
    """
    buffer = io.BytesIO()
    save(buffer)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"could not save {path} ({error}); what was saved before is kept: make room, "
                        "and go on with the same command (training: and --resume)") from None
    finally:
        with contextlib.suppress(OSError):  # moved away, where all went well
            temporary.unlink()
    flush_folder(path.parent)


def flush_folder(folder):
    """Have a folder's names on the disk, where the system can: no power failure takes them back."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(folder):
    """Make the folder; UserError where it, or a file in it, cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another --runs, or "
                        "make it writable") from None


def take_lock(path, wait):
    """Make and lock a file: its descriptor, whose closing unlocks it; None if another process has it.

    The system unlocks it however the process ends, and does not share it with processes it forks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is None:
        return descriptor
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks
    return descriptor


def hold_folder(folder):
    """Keep other processes from training in a folder until this one ends; UserError if one does."""
    check_writable(folder)
    path = folder.resolve() / ".lock"
    if (os.getpid(), path) in HELD and path.exists():
        return
    lock = take_lock(path, wait=False)
    if lock is None:
        raise UserError(f"another process is training in {folder}: wait for it, or use another --runs")
    HELD[os.getpid(), path] = lock
    for left_over in folder.glob(".checkpoint.pt.*.tmp"):  # of runs that were killed
        left_over.unlink()


def read_table(path, fields, numbers=()):
    """The rows of a CSV file, dicts of text; none where there is no file.

    numbers: the fields that hold a number, or nothing. Raises UserError for other columns, for a row
    that lacks a field or has one too many, for a number that is none, for no UTF-8.
    """
    if not path.exists():
        return []
    with open(path, "rb") as file:
        table, rows = csv.DictReader(map(bytes.decode, file), strict=True), []
        try:
            if table.fieldnames not in (None, list(fields)):  # None: an empty file
                raise UserError(f"{path} is not a table of {fields[0]} ... {fields[-1]}: move it away")
            for row in table:
                if None in row or None in row.values():
                    raise csv.Error("cut off, or with too many fields")
                for name in numbers:
                    float(row[name] or 0)
                rows.append(row)
        except UserError:
            raise
        except (ValueError, csv.Error) as error:  # no UTF-8, or no number
            raise UserError(f"{path} is damaged near line {table.reader.line_num} ({error}): repair "
                            "that line, or move the file away") from None
    return rows


def write_table(path, fields, rows):
    """Write dicts as a CSV file, whole; a field that a row lacks stays empty."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fields)
    table.writeheader()
    table.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def append_row(path, fields, row):
    """Add a row to a table; of several processes one after another does."""
    check_writable(path.parent)
    lock = take_lock(path.with_name(f".{path.name}.lock"), wait=True)
    try:
        write_table(path, fields, [*read_table(path, fields), row])
    finally:
        os.close(lock)
