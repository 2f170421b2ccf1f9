"""Whatever is in a checkpoint's files: an SAEFormatError that names the file, or a dictionary. Never code, never another error."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from editserver.catalogue import CatalogueError, OpenedSAE, check_fit
from sae_weights import SAEFormatError, load_sae
from sae_weights.formats import FORMATS
from tests.sae_weights.formats.hostile import (
    LIES,
    NOT_A_CONFIG,
    ODD,
    ODD_YAML,
    UNPICKLE,
    evil_contents,
    laughs,
    zeros_that_unpack_to,
)
from tests.sae_weights.formats.makers import MAKERS, TEXTS, WEIGHTS, files, read, rewrite, write_tensors

FLIPS = 30

every_format = pytest.mark.parametrize("made", MAKERS, ids=str)

NAMELESS = {"itda"}
"""Formats whose files hold one tensor each, without a name: there is nothing to put another one beside."""


class Case:
    """A checkpoint in a folder of its own, and what becomes of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.path = MAKERS[name](folder)

    @property
    def weights(self) -> list[Path]:
        found = files(self.folder, WEIGHTS)
        assert found, "a checkpoint without weights"
        return found

    @property
    def texts(self) -> list[Path]:
        return files(self.folder, TEXTS)

    def use(self, **how):
        """Open it and use all of it."""
        sae = load_sae(self.path, **how)
        x = torch.randn(3, sae.d_model, generator=torch.Generator().manual_seed(0))
        f = sae.encode(x)
        sae.decode_for(x, f)
        sae.rows([0, sae.n_features - 1])
        # Not the recorded one: that would not look at the weights.
        return sae.compute_digest()

    def refused(self, *naming: str) -> str:
        """It must be refused with a message that holds all of ``naming``, and a place within this checkpoint."""
        with pytest.raises(SAEFormatError) as raised:
            self.use()
        message = str(raised.value)
        assert str(self.folder) in message, f"names no file: {message}"
        for word in naming:
            assert word in message, f"does not name {word!r}: {message}"
        return message

    def survived(self) -> bool:
        """Whether it still opens; if not, it must be refused, naming a place within this checkpoint."""
        message = refusal(self.use)
        if message is None:
            return True
        assert str(self.folder) in message, f"names no file: {message}"
        assert len(message) < 4000, f"an endless message: {message[:300]}"
        return False


def refusal(opening) -> str | None:
    """What an opening is refused with; None where it is not."""
    try:
        opening()
    except SAEFormatError as error:
        return str(error)
    return None


@pytest.fixture
def case(made, tmp_path):
    return Case(made, tmp_path / "checkpoint")


def test_every_format_has_a_maker():
    assert {name.split(".")[0] for name in MAKERS} == {one.name for one in FORMATS}


@every_format
def test_an_undamaged_checkpoint_is_recognised_as_its_own_format(case):
    assert load_sae(case.path).origin.format == case.name.split(".")[0]
    case.use()


# Bytes


@every_format
def test_truncated_weights_are_refused(case):
    for file in case.weights:
        whole = file.read_bytes()
        for kept in sorted({0, 1, 7, 8, 64, len(whole) // 2, len(whole) - 1}):
            file.write_bytes(whole[:kept])
            case.refused()
        file.write_bytes(whole)
    case.use()


@every_format
def test_truncated_configs_are_refused_or_still_a_config(case):
    for file in case.texts:
        whole = file.read_bytes()
        for kept in range(0, len(whole), max(1, len(whole) // 25)):
            file.write_bytes(whole[:kept])
            case.survived()
        file.write_bytes(whole)


@every_format
def test_flipped_bytes_are_refused_or_change_a_value(case):
    chance = random.Random(case.name)
    damaged = [*case.weights, *case.texts]
    outcomes = set()
    for round in range(FLIPS):
        file = damaged[round % len(damaged)]
        whole = file.read_bytes()
        # Every other flip within the first kilobyte, where headers are.
        place = chance.randrange(min(len(whole), 1024) if round % 2 else len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        file.write_bytes(bytes(flipped))
        outcomes.add(case.survived())
        file.write_bytes(whole)
    assert False in outcomes, "no flip was refused: the test damages nothing that matters"


@every_format
def test_bytes_that_are_anything_are_refused(case):
    chance = random.Random(1)
    for file in case.weights:
        whole = file.read_bytes()
        for content in (
            b"\x00" * 64,
            b"\xff" * 64,
            b"PK\x03\x04" + b"\x00" * 60,
            b"{}",
            chance.randbytes(4096),
            b"\x80\x02N.",
        ):
            file.write_bytes(content)
            case.refused()
        # The first kilobyte of one kind, the rest of another.
        file.write_bytes(chance.randbytes(1024) + whole[1024:])
        case.refused()
        file.write_bytes(whole)


# Tensors


def stored_tensors(case):
    return [(file, key) for file in case.weights for key in read(file)]


def matrix_names(case):
    """Encoder and decoder, which no dictionary is without."""
    found = [(file, key, tensor) for file in case.weights for key, tensor in read(file).items()]
    matrices = [(file, key) for file, key, tensor in found if tensor.ndim >= 2 and tensor.is_floating_point()]
    # PolySAE keeps a W_dec that its decoder does not read.
    unread = ("W_skip", "W_dec") if case.name.startswith("polysae") else ("W_skip",)
    return [(file, key) for file, key in matrices if key[-1] not in unread and "threshold" not in key[-1]]


def called(key):
    """What an error calls a tensor; a file of several dictionaries has the place in front of the name."""
    name = key[-1]
    return name.split(".", 1)[1] if name.startswith("blocks-") else name


@every_format
def test_a_missing_tensor_is_named(case):
    matrices = matrix_names(case)
    for file, key in stored_tensors(case):
        whole = file.read_bytes()
        rewrite(file, lambda at, tensor, key=key: None if at == key else tensor)
        # Some tensors are optional (a threshold, a norm, k beside a config); the matrices never are.
        if (file, key) in matrices:
            case.refused(called(key))
        else:
            case.survived()
        file.write_bytes(whole)


RESHAPED = (
    lambda tensor: tensor[..., None].contiguous(),
    lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(3),
    lambda tensor: tensor[..., :-1].contiguous() if tensor.ndim else tensor.repeat(2, 2),
    lambda tensor: tensor[:0] if tensor.ndim else tensor.repeat(0),
)


@every_format
def test_a_tensor_of_another_shape_is_named(case):
    # Which of two that do not fit is wrong, nobody knows: either may be named, also as the matrix or field that it is.
    names = {called(key) for _, key in stored_tensors(case)} | {"W_enc", "W_dec", "threshold", "field", "skip"}
    matrices = matrix_names(case)
    for file, key in stored_tensors(case):
        whole = file.read_bytes()
        for change in RESHAPED:
            rewrite(file, lambda at, tensor, key=key, change=change: change(tensor) if at == key else tensor)
            if case.survived():
                assert (file, key) not in matrices, f"{key}: a wrong shape was accepted"
            else:
                message = case.refused()
                assert any(name in message for name in names), f"{key}: names no tensor: {message}"
            file.write_bytes(whole)


@every_format
def test_weights_that_are_whole_numbers_are_named(case):
    for file, key in matrix_names(case):
        whole = file.read_bytes()
        for dtype in (torch.int32, torch.int64, torch.uint8, torch.bool):
            rewrite(file, lambda at, tensor, key=key, dtype=dtype: tensor.to(dtype) if at == key else tensor)
            case.refused(file.name, called(key))
            file.write_bytes(whole)


@every_format
def test_complex_weights_are_named(case):
    for file, key in matrix_names(case):
        if file.suffix == ".safetensors":
            continue
        whole = file.read_bytes()
        rewrite(file, lambda at, tensor, key=key: tensor.to(torch.complex64) if at == key else tensor)
        case.refused(file.name, called(key))
        file.write_bytes(whole)


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_refused_or_not_part_of_the_function(case, value):
    sound = case.use()
    for file, key in stored_tensors(case):
        whole = file.read_bytes()

        def spoil(at, tensor, key=key):
            if at != key or not tensor.is_floating_point():
                return tensor
            tensor = tensor.clone()
            tensor.view(-1)[-1] = value
            return tensor

        rewrite(file, spoil)
        if (file, key) in matrix_names(case):
            message = case.refused("finite")
            # A dictionary of several files is named by its folder: its features are numbered through them.
            several = len(list(file.parent.glob(f"*{file.suffix}"))) > 1
            assert file.name in message or (several and str(file.parent) in message), message
        elif case.survived():
            # exp(−inf) = 0 is a threshold; norms that the mode does not use are not read.
            assert case.use() == sound or value != value or value < 0 or "threshold" in key[-1], key
        file.write_bytes(whole)


@pytest.mark.parametrize("made", [name for name in MAKERS if name not in NAMELESS])
def test_a_tensor_that_nobody_knows_is_refused(case):
    """It could change the meaning; what is ignored is ignored by name."""
    file = case.weights[0]
    if file.suffix in (".pt", ".pth"):
        content = torch.load(file, weights_only=True)
        inner = content.get("sae") or content
        # Beside an existing one: what belongs to another place in the same file is another dictionary's.
        first = next(iter(inner))
        inner[f"{first.rpartition('.')[0]}.surprise" if "." in first else "surprise"] = torch.ones(3)
        torch.save(content, file)
    else:
        tensors = {key[0]: tensor for key, tensor in read(file).items()}
        write_tensors(file, tensors | {"surprise": torch.ones(3)})
    case.refused("surprise")


@every_format
def test_endless_names_do_not_make_endless_messages(case):
    for file in case.weights:
        whole = file.read_bytes()
        tensors = {".".join(key): tensor for key, tensor in read(file).items()}
        write_tensors(file, tensors | {"x" * 30_000: torch.ones(3), "y": torch.ones([1] * 60)})
        message = refusal(lambda: load_sae(case.path))
        assert message is None or len(message) < 4000
        file.write_bytes(whole)


# Code


def test_the_evil_files_would_run_if_they_were_unpickled(tmp_path):
    marker = tmp_path / "ran"
    for what, content in evil_contents(marker):
        UNPICKLE[what](io.BytesIO(content))
        assert marker.is_dir(), what
        marker.rmdir()


@every_format
def test_code_in_weights_never_runs(case, tmp_path):
    marker = tmp_path / "ran"
    for file in case.weights:
        whole = file.read_bytes()
        for what, content in evil_contents(marker):
            file.write_bytes(content)
            case.refused(file.name)
            for one in FORMATS:
                with pytest.raises(SAEFormatError):
                    load_sae(case.path, format=one.name)
            assert not marker.exists(), f"{what} ran"
        file.write_bytes(whole)


@every_format
def test_code_in_configs_never_runs(case, tmp_path):
    marker = tmp_path / "ran"
    for file in case.texts:
        whole = file.read_bytes()
        for content in (
            f"!!python/object/apply:os.mkdir ['{marker}']\n",
            f"model_kind: !!python/object/apply:os.mkdir ['{marker}']\n",
            f"a: !!python/object/new:os.mkdir\n  args: ['{marker}']\n",
            "d_model: !!python/name:os.system\n",
            "d_model: !!python/module:os\n",
        ):
            file.write_text(content)
            assert not case.survived()
            assert not marker.exists()
        file.write_bytes(whole)


# Headers that lie


@pytest.mark.parametrize(
    "digest", ["", "../../../etc/passwd", "0" * 63, "0" * 65, "G" * 64, "0" * 63 + "\n", "x" * 9000]
)
def test_a_recorded_digest_is_a_digest(tmp_path, digest):
    case = Case("editserver", tmp_path / "checkpoint")
    file = case.folder / "sae.safetensors"
    save_file({key[0]: tensor for key, tensor in read(file).items()}, file, {"format": "pt", "digest": digest})
    case.refused("sae.safetensors: metadata 'digest' is", "expected 64 hexadecimal digits")


@every_format
def test_headers_that_lie_about_sizes_are_refused(case):
    for file in case.weights:
        whole, tensors = file.read_bytes(), read(file)
        for content in LIES[file.suffix](tensors):
            file.write_bytes(content)
            case.refused()
        file.write_bytes(whole)


def test_zeros_that_fill_the_memory_are_not_unpacked(tmp_path):
    case = Case("gemma_scope", tmp_path / "checkpoint")
    case.weights[0].write_bytes(zeros_that_unpack_to(128 << 20))
    assert "unpack to 134" in case.refused("params.npz")


# Configs


@every_format
def test_configs_that_are_none_are_refused(case):
    for file in case.texts:
        whole = file.read_bytes()
        for content in (*NOT_A_CONFIG, laughs()):
            file.write_bytes(content)
            case.survived()
        file.write_bytes(whole)
    case.use()


def fields_of(content, above=()):
    """Every field of a nested object."""
    for name, value in content.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*above, name))


@every_format
def test_any_value_in_any_field_is_refused_or_read(case):
    for file in (path for path in case.texts if path.suffix == ".json"):
        whole = file.read_bytes()
        for place in fields_of(json.loads(whole)):
            for value in (*ODD, ...):
                content = json.loads(whole)
                inner = content
                for name in place[:-1]:
                    inner = inner[name]
                if value is ...:
                    del inner[place[-1]]
                else:
                    inner[place[-1]] = value
                file.write_text(json.dumps(content))
                case.survived()
        file.write_bytes(whole)
    for file in (path for path in case.texts if path.suffix != ".json"):
        whole = file.read_text()
        for name in [line.split(":")[0] for line in whole.splitlines() if not line.startswith((" ", "-"))]:
            for value in ODD_YAML:
                lines = [f"{name}: {value}" if line.startswith(f"{name}:") else line for line in whole.splitlines()]
                file.write_text("\n".join(lines) + "\n")
                case.survived()
        file.write_text(whole)
    case.use()


# Places


@every_format
def test_links_in_circles_folders_for_files_and_nothing_at_all(case):
    for file in [*case.weights, *case.texts]:
        whole = file.read_bytes()
        file.unlink()
        case.survived()
        file.mkdir()
        case.survived()
        file.rmdir()
        file.symlink_to(file)
        case.survived()
        file.unlink()
        file.symlink_to(file.parent)
        case.survived()
        file.unlink()
        for device in ("/dev/null", "/dev/zero"):
            file.symlink_to(device)
            case.survived()
            file.unlink()
        os.mkfifo(file)
        case.survived()
        file.unlink()
        file.write_bytes(whole)
    case.use()


@every_format
def test_an_empty_folder_and_a_folder_of_folders_are_refused(case, tmp_path):
    name = case.name.split(".")[0]
    (tmp_path / "empty").mkdir()
    for file in [*case.weights, *case.texts]:
        (tmp_path / "folders" / file.relative_to(case.folder)).mkdir(parents=True)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for place in ("empty", "folders", "circle", "absent", "folders/" + str(case.path.relative_to(case.folder))):
        for format in (None, name):
            with pytest.raises(SAEFormatError) as raised:
                load_sae(tmp_path / place, format=format)
            assert place.split("/")[0] in str(raised.value)


@every_format
def test_a_checkpoint_of_one_format_is_refused_or_read_by_every_other(case):
    for one in FORMATS:
        for place in (case.path, case.path.parent, case.weights[0]):
            message = refusal(lambda place=place, one=one: load_sae(place, format=one.name))
            assert message is None or str(case.folder.parent) in message


def test_a_dictionary_of_another_model_is_refused_naming_both_widths_and_the_file(tmp_path):
    for name, maker in MAKERS.items():
        sae = load_sae(maker(tmp_path / name))
        if sae.refusal is not None:
            continue
        with pytest.raises(CatalogueError) as raised:
            check_fit([OpenedSAE("mine", sae.hook.edit_layer, sae)], d_model=576, n_layers=30)
        for word in ("mine", str(sae.d_model), "576", sae.origin.path):
            assert word in str(raised.value)
