"""The directories that models come from: found, described, and copied without the weights."""

import dataclasses
import json
import shutil
from collections.abc import Collection
from pathlib import Path

from jaxpref import workdir
from jaxpref.errors import UserError
from jaxpref.models.huggingface import safetensors
from jaxpref.models.huggingface.families import FAMILIES
from jaxpref.models.huggingface.family import Family
from jaxpref.models.huggingface.safetensors import TensorFiles
from jaxpref.workdir import AnyPath, as_path, is_address

# This file says the name, shape and dtype of every tensor, in a copy without weights.
_TENSORS = "tensors.json"
# A template in a file of its own wins over the one in the tokenizer's config, so it goes with
# the tokenizer.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),
)
_NOT_COPIED = {safetensors.INDEX, "pytorch_model.bin.index.json", _TENSORS}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The Hugging Face directory that a model was read from, or a copy without the weights.

    Attributes:
      architecture: a key of `FAMILIES`.
      directory: holds `config.json`, tokenizer files, and the weights or `tensors.json`; a path
        or an address; empty for a model with random weights.
      config: the text of `config.json`, for a model without a directory.
    """

    architecture: str
    directory: str = ""
    config: str = ""

    @property
    def family(self) -> Family:
        """The family of the model."""
        return FAMILIES[self.architecture]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor by name, in the order of the files.

        Empty for a model without a directory.
        """
        if not self.directory:
            return {}
        directory = as_path(self.directory)
        if (kept := workdir.read(directory / _TENSORS)) is not None:
            return {
                name: (tuple(shape), dtype) for name, (shape, dtype) in json.loads(kept).items()
            }
        stored = TensorFiles(directory).stored
        return {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()}

    def copy(self, directory: Path, *, tensors: bool) -> "Origin":
        """Copies everything but the weights.

        Args:
          directory: receives the files; may be the origin's own.
          tensors: also write what the headers of the weights say, so that the copy can stand
            in for this origin.

        Returns:
          The copy; for a model without a directory, this origin itself.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if not self.directory:
            (directory / "config.json").write_text(self.config)
            return self
        if tensors:
            (directory / _TENSORS).write_text(json.dumps(self.tensors(), indent=1))
        copy_small_files(as_path(self.directory), directory)
        return dataclasses.replace(self, directory=str(directory))


def locate(source: str | AnyPath) -> AnyPath:
    """The directory of a model or of adapters.

    Args:
      source: a directory, which may be in a bucket; or a name on the hub, of which a local copy is
        made if needed.

    Raises:
      UserError: it is neither of these, or the hub cannot be reached.
    """
    path = as_path(source)
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{path}: is no Hugging Face model: it has no config.json.")
        return path
    if is_address(str(source)):
        raise UserError(f"{source}: no such folder in the bucket.")
    if path.is_absolute() or str(source).count("/") != 1 or path.exists():
        raise UserError(f"{source}: is neither a directory nor a hub name (owner/model).")
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            str(source),
            allow_patterns=[*workdir.SMALL_FILES, "*.safetensors"],
            # Some repositories hold the same weights a second time, in another layout.
            ignore_patterns=["original/*", "consolidated*"],
        )
        return Path(folder)
    except Exception as error:  # The hub's client raises errors of many classes.
        raise UserError(
            f"{source}: no such directory here, and the hub could not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Without a network, download "
            "the model elsewhere and give the path of its directory."
        ) from error


def small_files(directory: AnyPath) -> Path:
    """A directory of a disk with a model's files that are no weights: itself, or a copy.

    Raises:
      UserError: it is not there, or cannot be read.
    """
    try:
        files = workdir.get(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be read: {error.strerror or error}.") from error
    if files is None:
        raise UserError(f"{directory}: is no Hugging Face model: there is no such directory.")
    return files


def known_stops(directory: AnyPath) -> list[int]:
    """The ids at which a model's generation stops, as its files say."""
    files = small_files(directory)
    generation = files / "generation_config.json"
    said = generation if generation.exists() else files / "config.json"
    ids = json.loads(said.read_text()).get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]


def copy_small_files(source: AnyPath, directory: Path, *, but: Collection[str] = ()) -> None:
    """Copies the files of a model that are no weights: configs, tokenizer, templates.

    Args:
      source: the directory to copy from.
      directory: receives the files.
      but: names of files to leave out.
    """
    files = small_files(source)
    for pattern in workdir.SMALL_FILES:
        for path in files.glob(pattern):
            if path.name not in {*_NOT_COPIED, *but} and path.parent != directory:
                shutil.copyfile(path, directory / path.name)


def remove_tokenizer(directory: Path) -> None:
    """Removes the files of a tokenizer, so that another one can be written in its place."""
    for pattern in _TOKENIZER_FILES:
        for path in directory.glob(pattern):
            path.unlink()
