"""Write a model as a folder in Meta's layout. A save may be killed at any moment."""
import filecmp
import math
import mmap
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch

from common.checks import meta_ffn_dim
from common.distributed import is_sharded, whole
from common.files import SAVING, whole_file, write_json
from data.tokenizer import Tokenizer
from model import LLaMA, ModelConfig
from weights.checks import crc32_of

CHECKPOINT = "consolidated.00.pth"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of adapter.py
SAVED = ".saved"    # in the model's folder: the files of a finished save, not yet at their places


def save_model(model: LLaMA, folder: str | Path, tokenizer: Tokenizer | None = None,
               dtype: torch.dtype | None = None) -> None:
    """Write a folder that load_model reads back bit for bit, by save_folder.

    tokenizer: its files are copied; None leaves the folder's.
    dtype: of the saved weights; None is the model's own (bfloat16 halves the file).
    """
    tensors = model.state_dict()
    assert "norm.weight" in tensors, "give the LLaMA itself, not its compiled or parallel wrapper"

    def write(path: Path) -> None:
        if is_sharded(model):
            assert dtype is None, "sharded weights are saved as they are"
            save_one_by_one(path, tensors)
        else:
            save_tensors(path, {name: compact_tensor(tensor, dtype)
                                for name, tensor in tensors.items()})
    save_folder(folder, {"params.json": params_json(model.config)}, tokenizer, CHECKPOINT, write)


def save_folder(folder: str | Path, json_files: dict[str, Any], tokenizer: Tokenizer | None,
                weights: str, write_weights: Callable[[Path], Any]) -> None:
    """Write a model's folder: {name: content} of its JSON files, the tokenizer's files, and the
    file of its weights by write_weights(path). Other files in it are left alone, but for the
    weights of the model before.

    Killed at any moment, a save leaves one model that loads, the one before or this one, and never
    a mixture:

        1. Write all files into .saving/, each flushed to the disk.
           Killed here, the folder is as it was.
        2. Rename .saving to .saved. At this moment the new model replaces the old one.
        3. Move the files to their places.
           Killed here, load_model looks into .saved first, and the next save ends the move.

    Where only the weights are new, as in the saves of one run, steps 2 and 3 are one rename. A
    process that loads the model meanwhile is then not disturbed.
    """
    folder = Path(folder)
    finish_save(folder)
    saving = folder / SAVING
    shutil.rmtree(saving, ignore_errors=True)
    try:
        for name, content in json_files.items():
            write_json(saving / name, content)
        tokenizer_files = tokenizer.files() if tokenizer is not None else {}
        for name, data in tokenizer_files.items():
            with whole_file(saving / name) as file:
                file.write(data)
        only_weights_are_new = replaces_weights(saving, folder, weights)
        write_weights(saving / weights)
        if only_weights_are_new:
            os.replace(saving / weights, folder / weights)
            shutil.rmtree(saving)
        else:
            os.replace(saving, folder / SAVED)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        raise
    finish_save(folder)


def replaces_weights(saving: Path, folder: Path, weights: str) -> bool:
    """Whether `folder` holds a model whose weights are this one file, and all files of `saving`
    just as they are."""
    names = [file.name for file in saving.iterdir()]
    _, different, missing = filecmp.cmpfiles(saving, folder, names, shallow=False)
    return not different and not missing and [f.name for f in weight_files(folder)] == [weights]


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights of a model, or of an adapter."""
    return sorted([*folder.glob("consolidated.*.pth"), *folder.glob(ADAPTER)])


def finish_save(folder: Path) -> None:
    """Move the files of a finished save to their places."""
    saved = folder / SAVED
    if not saved.is_dir():
        return
    # The weights are the first to move. What is left of another model must be gone by then: parts
    # of its checkpoint, or the adapter that it was.
    for weights in weight_files(saved):
        for file in [*weight_files(folder), folder / ADAPTER_CONFIG]:
            if file.exists() and not (saved / file.name).exists():
                file.unlink()
        os.replace(weights, folder / weights.name)
    for file in sorted(saved.iterdir()):
        os.replace(file, folder / file.name)
    saved.rmdir()


def find_file(folder: str | Path, name: str) -> Path:
    """The path of a file in a model's folder: in .saved, where a save was killed while it moved
    its files; else at its usual place, whether it exists or not."""
    moving = Path(folder) / SAVED / name
    return moving if moving.exists() else Path(folder) / name


# ---- params.json ---------------------------------------------------------------------------------

def params_json(config: ModelConfig) -> dict[str, Any]:
    """params.json of a model: Meta's keys, and ours, which are `max_seq_len` and `rope`."""
    params = {"dim": config.dim, "n_layers": config.n_layers,
              "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads,
              "vocab_size": config.vocab_size, "multiple_of": config.multiple_of,
              "ffn_dim_multiplier": config.ffn_dim_multiplier,
              "max_seq_len": config.max_seq_len, "norm_eps": config.norm_eps,
              "rope_theta": config.rope.base, "rope": config.rope.to_dict()}
    # Meta's code knows neither head_dim nor ffn_dim: they are written only where its rules cannot
    # give these numbers.
    if config.head_dim * config.n_heads != config.dim:
        params["head_dim"] = config.head_dim
    if config.ffn_dim != meta_ffn_dim(config):
        rule = meta_ffn_rule(config.dim, config.ffn_dim)
        params |= {"ffn_dim_multiplier": None} | (rule or {"ffn_dim": config.ffn_dim})
    if config.rope.rope_type == "llama3":
        params["use_scaled_rope"] = True  # for Meta's code, which does not know `rope`
    return {key: value for key, value in params.items() if value is not None}


def meta_ffn_rule(dim: int, ffn_dim: int) -> dict[str, int | float]:
    """The keys by which Meta's rule gives the feed-forward width F = ffn_dim, or {}. With them
    Meta's own code runs a model that came from another layout.

        F = int(ffn_dim_multiplier * int(8 C / 3)), rounded up to a multiple of multiple_of
    """
    multiple_of = math.gcd(ffn_dim, 256)
    two_thirds = int(8 * dim / 3)
    multiplier = ffn_dim / max(1, two_thirds)
    if math.ceil(two_thirds / multiple_of) * multiple_of == ffn_dim:
        return {"multiple_of": multiple_of}
    if math.ceil(int(multiplier * two_thirds) / multiple_of) * multiple_of == ffn_dim:
        return {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    return {}


# ---- Tensors -------------------------------------------------------------------------------------

def compact_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor as it goes into a file: on the CPU, contiguous, in a storage that holds nothing
    else. A view into a larger storage would be saved with all of it."""
    tensor = tensor.to("cpu", dtype or tensor.dtype).contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()


def save_tensors(path: Path, value: Any) -> None:
    """torch.save, whole or not at all.

    A full disk is an OSError that names the file, also where PyTorch hides it in a RuntimeError.
    """
    try:
        with whole_file(path) as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def save_one_by_one(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """torch.save of sharded tensors, in a folder that is renamed afterwards. Rank 0 never holds
    more than one of them whole; the other ranks call give_shards meanwhile.

        1. Save empty tensors. skip_data leaves room for their bytes and writes none.
        2. Map the file: what is copied into its tensors goes to the disk. Gather one after another.
        3. Correct the archive's checksums.
    """
    # torch.empty takes no memory before something is written into it.
    room = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    with torch.serialization.skip_data():
        torch.save(room, path)
    with open(path, "rb+") as file:     # a full disk is an error here, and not a signal later
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        written = torch.load(path, mmap=True, weights_only=True)
    for name, tensor in tensors.items():
        written[name].copy_(whole(tensor))
    del written
    with open(path, "rb+") as file:
        correct_checksums(file)
        file.flush()
        os.fsync(file.fileno())


def correct_checksums(file: IO[bytes]) -> None:
    """Of a .pth file, a zip archive, whose records were written after their checksums. These stand
    in the header of a record, at byte 14, in its entry of the directory, at byte 16, and in a
    descriptor behind its data, at byte 4."""
    with zipfile.ZipFile(file) as archive:
        entry, records = archive.start_dir, archive.infolist()
    for record in records:
        file.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(record.header_offset + 30 + name + extra)
        checksum = crc32_of(file, record.file_size)
        places = [record.header_offset + 14, entry + 16]
        if record.flag_bits & 8:                                    # a descriptor behind the data
            places.append(file.tell() + 4)
        for place in places:
            file.seek(place)
            file.write(struct.pack("<I", checksum))
        file.seek(entry + 28)
        entry += 46 + sum(struct.unpack("<HHH", file.read(6)))      # name, extra field, comment


def give_shards(tensors: Iterable[torch.Tensor]) -> None:
    """For the ranks that do not write. Putting a tensor together takes all ranks: each calls
    whole() on the same tensors in the same order as rank 0, or all would wait for ever."""
    for tensor in tensors:
        whole(tensor)
