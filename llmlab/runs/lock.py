"""One run a folder: a lock that lives as long as its process, on this machine or another that shares the disk.

What a folder may hold before a run begins is `checkpoints.claim`'s business.
"""

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llmlab.settings.errors import UserError
from llmlab.settings.paths import LOCK

try:
    import fcntl
except ImportError:  # Windows has none: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 100  # to lock a file that other runs keep removing
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # a file system that cannot, as some network disks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder where it is missing, and holds it against other processes; forked ones inherit no lock.

    Raises:
        UserError: another process holds it.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with _lock(folder) as handle:
        try:
            handle.write(f"{os.getpid()} on {platform.node()}")
            handle.flush()
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # still locked: whoever opened it meanwhile looks again


def _lock(folder: Path) -> IO[str]:
    """Returns the locked file of a folder."""
    path = folder / LOCK
    for _ in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # a run that was refused has just removed the folder
            continue
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(handle.fileno())):
                handle.truncate(0)  # a dead process left its name
                return handle
        except FileNotFoundError:  # its owner has just removed it
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return handle
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            handle.seek(0)
            owner = handle.read().strip()
            handle.close()
            raise UserError(
                f"{folder}: another run{f' (process {owner})' if owner else ''} is writing into this folder; "
                "wait for it, stop it, or choose another folder"
            ) from None
        handle.close()
    raise UserError(f"{folder}: other runs keep taking this folder; choose another")
