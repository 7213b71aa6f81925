"""One process per run folder: a lock that the system releases when its process ends, also on shared disks. Whether the
folder may hold something already is checked by `checkpoints.claim`."""

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
except ImportError:  # Windows has none: two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 100  # other processes may remove the file between opening and locking it
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems without locks, as some network disks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder where it is missing and holds it against other processes; forked ones inherit no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with _lock(folder) as handle:
        try:
            handle.truncate(0)  # a killed process left its name
            handle.write(f"{os.getpid()} on {platform.node()}")
            handle.flush()
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while locked: a process that has it open tries again


def _lock(folder: Path) -> IO[str]:
    """Returns the locked file of a folder."""
    path = folder / LOCK
    for _ in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # the lock's last owner has just removed the folder
            continue
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(handle.fileno())):
                return handle
        except FileNotFoundError:  # its last owner has just removed it
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return handle
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            handle.seek(0)
            owner, advice = handle.read().strip(), "wait for it, stop it, or choose another folder"
            run = f"another run (process {owner})" if owner else "another run"
            raise UserError(f"{folder}: {run} is writing into this folder; {advice}") from None
        handle.close()
    raise UserError(f"{folder}: other runs keep taking this folder; choose another")
