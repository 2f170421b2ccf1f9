"""numpy archives (.npz), read with ``allow_pickle=False``: arrays of numbers and nothing else."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError

from .devices import refuse_devices
from .loaded import LoadedTensors

# Weights hardly compress at all; a file of zeros, which fills the memory when it is read, compresses a thousandfold.
_MOST_COMPRESSED = 50
_SMALL = 64 << 20


class NpzFile(LoadedTensors):
    """Names, shapes and tensors of an .npz archive, read whole (an archive member cannot be mapped)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _read(path))


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise SAEFormatError(f"{path}: is a folder; expected an .npz file")
    tensors: dict[str, Tensor] = {}
    name = ""
    refuse_devices(path)
    try:
        # Opened here: numpy leaves a file open that turns out to be no archive.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SAEFormatError(f"{path}: a single array; expected an .npz archive")
            unpacked = sum(entry.file_size for entry in archive.zip.infolist())
            if unpacked > max(_SMALL, _MOST_COMPRESSED * path.stat().st_size):
                raise SAEFormatError(
                    f"{path}: {path.stat().st_size} bytes unpack to {unpacked}: no weights compress so far"
                )
            for name in archive.files:
                tensors[name] = torch.from_numpy(np.ascontiguousarray(archive[name]))
    except SAEFormatError:
        raise
    except FileNotFoundError:
        raise SAEFormatError(f"{path}: no such file") from None
    except MemoryError as error:
        raise SAEFormatError(f"{path}: array {name!r} asks for more memory than there is") from error
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, SyntaxError, OverflowError) as error:
        raise SAEFormatError(_message(path, name, error)) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, AttributeError, UnicodeDecodeError) as error:
        raise SAEFormatError(_message(path, name, error)) from error
    return tensors


def _message(path: Path, name: str, error: Exception) -> str:
    where = f" at array {name!r}" if name else ""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path}: not a readable .npz file{where} ({reason[:200]})"
