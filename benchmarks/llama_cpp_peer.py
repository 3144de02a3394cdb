"""llama.cpp as a peer: writes a model of ours as GGUF (types f16, bf16, q8_0) and times prefill and decode.

Needs the packages gguf and llama-cpp-python; used by the benchmarks only.
"""

from pathlib import Path

import numpy as np
import torch

from statespan.models.language_model import LanguageModel

TENSORS = {
    "mixer_norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
MATRICES = ("ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight", "token_embd.weight")


def write_gguf(model: LanguageModel, path: Path, kind: str) -> None:
    """Write a pure Mamba-1 model; `kind` is the type of the matrices: "f32", "f16", "bf16" or "q8_0"."""
    import gguf  # type: ignore[import-not-found]  # a peer's package, present only where it is compared

    config = model.config
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(config.layers))
    writer.add_ssm_conv_kernel(config.mamba1.conv_kernel)
    writer.add_ssm_inner_size(config.mamba1_inner_size)
    writer.add_ssm_state_size(config.mamba1.state_size)
    writer.add_ssm_time_step_rank(config.mamba1_dt_rank)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.padded_vocab_size)

    def add(name: str, tensor: torch.Tensor) -> None:
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        quantized = name.endswith(MATRICES) and values.shape[-1] % 32 == 0  # q8_0 works on blocks of 32
        as_type = gguf.GGMLQuantizationType[kind.upper() if quantized else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, as_type), raw_dtype=as_type)

    add("token_embd.weight", model.embedding.weight)
    add("output_norm.weight", model.final_norm.weight)
    for index, layer in enumerate(model.layers):
        for ours, theirs in TENSORS.items():
            tensor = layer.get_parameter(ours)
            if ours == "mixer.A_log":
                tensor = -tensor.exp()
            add(f"blk.{index}.{theirs}", tensor.squeeze(1) if ours == "mixer.conv1d.weight" else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A loaded GGUF model; `prefill` and `decode` leave logits behind."""

    def __init__(self, path: Path, threads: int) -> None:
        from llama_cpp import Llama  # type: ignore[import-not-found]  # as above

        self.llama = Llama(
            str(path), n_ctx=4096, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt from an empty state."""
        self.llama.reset()
        self.llama.eval(ids)

    def decode(self, count: int) -> None:
        """Generate `count` tokens one by one (the same token each time; only the time counts)."""
        for _ in range(count):
            self.llama.eval([7])

    def logits(self) -> torch.Tensor:
        """Logits after the last token."""
        pointer = self.llama._ctx.get_logits()
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(self.llama.n_vocab(),)).copy())
