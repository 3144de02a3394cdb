"""Load, save and convert checkpoints, one tensor at a time."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from statespan.checkpoints.atomic_save import replacing
from statespan.checkpoints.families import Family, transformers_family
from statespan.checkpoints.families.family import write_token_ids
from statespan.checkpoints.families.native import NATIVE
from statespan.checkpoints.identify import CONFIG, GENERATION, identify
from statespan.checkpoints.safetensors_io import write_shards
from statespan.checkpoints.tokenizer import find_tokenizer
from statespan.checkpoints.weight_files import open_weights
from statespan.checkpoints.weight_map import Index
from statespan.checkpoints.weight_names import Matched, match_files, pieces_to_write
from statespan.errors import CheckpointError, UnknownName, UserError
from statespan.layers.linear import int4_weight
from statespan.layers.moe import quantize_stack
from statespan.machine import usable_device
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.quantize import Quantization, is_quantized, quantized_weights
from statespan.models.quantize import quantize as quantize_model
from statespan.ops import quantize_rows

Format = Literal["statespan", "transformers"]

# Files that belong to a checkpoint: a save removes those that it does not write itself.
OWNED = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|chat_template\.jinja|model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors"
)


def detect(path: str | Path) -> str:
    """The format of a checkpoint: statespan, mamba, mamba2, jamba, mixtral, llama, mistral, state-spaces or blackmamba.

    Args:
        path: the checkpoint's folder.
    Returns:
        The name; no weights are read.
    Raises:
        CheckpointError: there is no checkpoint, or its format is not known.
    """
    return identify(Path(path)).family.name


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
) -> LanguageModel:
    """The model of a checkpoint in any format that `detect` knows, in evaluation mode, with its tokenizer.

    Args:
        path: the folder of the checkpoint.
        device: where the weights go.
        dtype: of the weights; None is as stored, float16 becoming float32, which holds its values and has fast CPU
            forms. A_log, D and dt_bias are float32 always.
        quantize: "int8", "experts_int8" or "int4": as `statespan.quantize` afterwards, but piece by piece on the way
            in, so that the full weights are never all in memory.
    Returns:
        The model; `model.tokenizer` is None where the checkpoint has no tokenizer.json and is not byte-level.
    Raises:
        CheckpointError: one line that names the file, key or tensors: something is missing, empty, truncated,
            corrupted, left over, of another shape, or asks for a feature that is not supported.
        UserError: dtype is no floating type of PyTorch's, or there is no such device here.
    Numerics: tensors are read, cast and placed one by one, so the peak is the model and one tensor.

    Example:
        >>> model = load("checkpoint", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype must be one of PyTorch's floating types, such as torch.bfloat16; got {dtype!r}")
    device, found = usable_device(device), identify(Path(path))
    config = found.read_config()
    with torch.device("meta"):
        model = LanguageModel(config)
    weights = match_files(found.family, model, open_weights(found.directory), found.directory)
    stored = weights.dtype("embedding.weight")
    model = model.to(dtype or (torch.float32 if stored == torch.float16 else stored))
    model.load_state_dict(_read(weights, model, quantize, device), assign=True)
    model.tokenizer = find_tokenizer(found.directory, config)
    return model.eval()


def _read(
    weights: Matched, model: LanguageModel, mode: Quantization | None, device: torch.device | str
) -> dict[str, Tensor]:
    """All tensors of `model`, which is on the meta device and gets quantised layers where there is a mode."""
    full, tensors = model.state_dict(), dict[str, Tensor]()
    if mode is not None:
        quantize_model(model, mode)
    places, own = quantized_weights(model), model.state_dict()
    for name, target in full.items():
        pieces = ((part.ours, weights.read(part)) for part in weights.parts[name])
        if name not in places:
            tensors[name] = _join(pieces, target, device).to(own[name].dtype)
        elif (scale := places[name]) is None:
            tensors[name] = int4_weight(_join(pieces, target, device))
        else:
            tensors[name], tensors[scale] = _join_int8(pieces, target, device)
    if "lm_head.weight" in own and "lm_head.weight" not in full:  # int8, of a tied embedding
        tensors["lm_head.weight"], tensors["lm_head.scale"] = quantize_rows(tensors["embedding.weight"])
    return tensors


def save(
    model: LanguageModel,
    directory: str | Path,
    format: Format = "statespan",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, safetensors and the tokenizer; a checkpoint that is there is replaced whole or not at all.

    Args:
        model: what to save.
        directory: the checkpoint's folder; files that belong to no checkpoint stay.
        format: "statespan" holds every model; "transformers" writes what AutoModelForCausalLM loads, as Mamba, Mamba2,
            Jamba, Mixtral, Mistral or Llama; settings of training alone, such as an expert capacity, are not kept.
        max_shard_bytes: weights beyond this are split into shards with an index.
    Raises:
        CheckpointError: transformers cannot express the model, it is quantised, or the files cannot be written.
    """
    directory = Path(directory)
    if is_quantized(model):
        raise CheckpointError(
            "this model was quantised for inference and its full weights are gone; save the model before "
            "statespan.quantize, or load and quantise it again where it is used"
        )
    family = _family_of(format, model.config)
    json_files = _json_files(family, model)
    pieces = pieces_to_write(family, model)

    def read(name: str) -> Tensor:
        part, piece = pieces[name][0]
        like = piece.new_empty(part.shape, device="meta")
        return _join(((part.theirs, piece) for part, piece in pieces[name]), like, "cpu").contiguous()

    sizes = {name: sum(piece.nbytes for _, piece in group) for name, group in pieces.items()}
    try:
        with replacing(directory, lambda name: OWNED.fullmatch(name) is not None) as staging:
            write_shards(staging, sizes, read, max_shard_bytes=max_shard_bytes)
            for name, content in json_files.items():
                (staging / name).write_text(json.dumps(content, indent=2) + "\n")
            if model.tokenizer is not None:
                model.tokenizer.save(staging)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {directory}: {error.strerror or error}; make room or choose another folder; "
            "what was there is whole"
        ) from error


def convert(source: str | Path, target: str | Path, format: Format = "statespan") -> None:
    """Read a checkpoint of any format and write it to `target` in another.

    Args:
        source: the folder of a checkpoint of any format.
        target: a folder; a checkpoint that is there is replaced whole or not at all.
        format: as in `save`.
    Raises:
        CheckpointError: as in `load` and `save`.

    Example:
        >>> convert("mamba-130m", "mamba-130m-hf", "transformers")  # doctest: +SKIP
    """
    save(load(source), target, format)


def _join(pieces: Iterable[tuple[Index, Tensor]], like: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the shape and dtype of `like`, out of pieces and where each goes."""
    whole: Tensor | None = None
    for index, piece in pieces:
        if not index:
            return piece.to(device, like.dtype)
        whole = torch.empty_like(like, device=device) if whole is None else whole
        whole[index] = piece.to(device, like.dtype)
    assert whole is not None  # every tensor has a part
    return whole


def _join_int8(
    pieces: Iterable[tuple[Index, Tensor]], like: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """As `_join`, but each piece, which has whole rows, becomes int8 with scales on the way."""
    whole = torch.empty(like.shape, dtype=torch.int8, device=device)
    scale = torch.empty(like.shape[:-1], dtype=torch.float32, device=device)
    for index, piece in pieces:
        quantized, scales = quantize_stack(piece.to(device, like.dtype))
        whole[index], scale[index] = quantized, scales
    return whole, scale


def _family_of(name: str, config: ModelConfig) -> Family:
    if name == "statespan":
        return NATIVE
    if name == "transformers":
        return transformers_family(config)
    raise UnknownName("checkpoint format", name, get_args(Format))


def _json_files(family: Family, model: LanguageModel) -> dict[str, dict[str, Any]]:
    assert family.write_config is not None  # only such families are chosen for writing
    config = family.write_config(model.config)
    if family is NATIVE:
        return {CONFIG: config}
    ids = {name: value for name, value in write_token_ids(model.config).items() if value is not None}
    return {CONFIG: config | {"dtype": str(model.dtype).removeprefix("torch.")}, GENERATION: ids}
