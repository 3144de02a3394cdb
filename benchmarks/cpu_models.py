"""Whole models on the CPU beside transformers, mambapy and llama.cpp: prefill, training step, decode.

    python -m benchmarks.cpu_models [prefill train decode jamba] [--quick] [--length 2048]

Random weights; every peer runs the same ones. Peers that cannot be imported are left out. transformers trains only two
layers and mambapy four, their time is scaled by the layers' number (said in the note): whole models would take an hour.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import statespan
from benchmarks.llama_cpp_peer import LlamaCpp, write_gguf
from benchmarks.record import Row, report
from benchmarks.timing import time_in_turns
from statespan.layers.config import AttentionConfig, Mamba1Config, MLPConfig, MoEConfig
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import pattern_from_periods
from statespan.training.allocator import keep_freed_memory

JAMBA = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    layers=pattern_from_periods(8, attention_period=8, attention_offset=4, expert_period=2, expert_offset=1),
    mamba1=Mamba1Config(inner_norms=True),
    attention=AttentionConfig(num_heads=8, num_kv_heads=2),
    mlp=MLPConfig(intermediate_size=1536),
    moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=1536),
    norm_epsilon=1e-6,
    tie_embeddings=False,
)
LENGTH, NEW_TOKENS = 2048, 128
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def models_of(config: ModelConfig | str, int8: bool = True) -> dict[str, LanguageModel]:
    """Our model in each number format."""
    built = {f"statespan {name}": statespan.build(config, seed=0, dtype=dtype).eval() for name, dtype in TYPES.items()}
    if int8:
        built["statespan int8"] = statespan.quantize(statespan.build(config, seed=0, dtype=torch.bfloat16).eval())
    return built


def transformers_models(model: LanguageModel) -> dict[str, Any]:
    """The same weights in transformers, float32 and bfloat16."""
    if find_spec("transformers") is None:
        return {}
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, format="transformers")
        return {
            f"transformers {name}": AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            for name, dtype in TYPES.items()
        }


def llama_models(model: LanguageModel, folder: Path, kinds: tuple[str, ...]) -> dict[str, LlamaCpp]:
    """The same weights in llama.cpp. Its q8_0 prefill dies of an illegal instruction where AMX needs permission."""
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        return {}
    peers = {}
    for kind in kinds:
        write_gguf(model, folder / f"{kind}.gguf", kind)
        peers[f"llama.cpp {kind}"] = LlamaCpp(folder / f"{kind}.gguf", torch.get_num_threads())
    return peers


def our_decode(model: LanguageModel, ids: torch.Tensor, count: int) -> Callable[[], object]:
    """Greedy generation through the public function, from the state of a 16-token prompt."""
    start = statespan.generate(model, ids[0, :16].tolist(), max_new_tokens=1, temperature=0.0, return_state=True).state
    return lambda: statespan.generate(model, [], state=start, max_new_tokens=count, temperature=0.0)


def hf_decode(model: Any, ids: torch.Tensor, count: int) -> Callable[[], object]:
    """transformers' own greedy generation with its cache; it reads the 16-token prompt too, some 5% of the time."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids[:, :16], attention_mask=torch.ones_like(ids[:, :16]), **options)


def in_inference(run: Callable[[], object]) -> Callable[[], object]:
    """`run` without autograd."""

    def call() -> None:
        with torch.inference_mode():
            run()

    return call


def timed_rows(task: str, candidates: dict[str, Callable[[], object]], tokens: int, repetitions: int) -> list[Row]:
    """Tokens a second of each candidate, in turns."""
    timings = time_in_turns({name: in_inference(run) for name, run in candidates.items()}, repetitions=repetitions)
    return [Row(task, name, tokens / t.median_s, "tok/s", t.spread) for name, t in timings.items()]


def prefill_rows(config: ModelConfig | str, name: str, repetitions: int, length: int) -> list[Row]:
    """Prefill of one prompt: logits of the last token, and the state."""
    ours, ids = models_of(config, int8=False), torch.randint(0, 4000, (1, length))
    runs: dict[str, Callable[[], object]] = {
        key: (lambda m=model: m(ids, state=m.new_state(1), logits_at="last")) for key, model in ours.items()
    }
    for key, peer in transformers_models(ours["statespan float32"]).items():
        runs[key] = lambda m=peer: m(ids, use_cache=True, logits_to_keep=1)
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("mamba"):
            for key, peer in llama_models(ours["statespan float32"], Path(folder), ("f16", "bf16")).items():
                runs[key] = lambda m=peer: m.prefill(ids[0].tolist())
        return timed_rows(f"{name}, prefill {length}", runs, length, repetitions)


def decode_rows(config: ModelConfig | str, name: str, repetitions: int, count: int) -> list[Row]:
    """Greedy decode at batch 1."""
    ours, ids = models_of(config), torch.randint(0, 4000, (1, 64))
    runs = {key: our_decode(model, ids, count) for key, model in ours.items()}
    for key, peer in transformers_models(ours["statespan float32"]).items():
        runs[key] = hf_decode(peer, ids, count)
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("mamba"):
            for key, peer in llama_models(ours["statespan float32"], Path(folder), ("f16", "bf16", "q8_0")).items():
                runs[key] = lambda m=peer: m.decode(count)
        return timed_rows(f"{name}, decode, batch 1", runs, count, repetitions)


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], autocast: bool) -> Callable[[], object]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train_rows(repetitions: int) -> list[Row]:
    """One training step of Mamba-130m on 2 x 512 tokens; memory is kept between steps, as `statespan train` does."""
    keep_freed_memory()
    ids, task, rows = torch.randint(0, 4000, (2, 512)), "mamba-130m, training step 2 x 512", []
    model = statespan.build("mamba-130m", seed=0)

    def loss() -> torch.Tensor:
        value = model(ids, labels=ids).loss
        assert value is not None
        return value

    runs = {
        f"statespan {kind}": training_step(model, loss, kind != "float32") for kind in ("float32", "bfloat16 autocast")
    }
    for key, timing in time_in_turns(runs, repetitions=repetitions).items():
        rows.append(Row(task, key, ids.numel() / timing.median_s, "tok/s", timing.spread))
    for key, (layers, step) in _training_peers(model.config, ids).items():
        timing = time_in_turns({key: step}, repetitions=3, seconds_each=5)[key]
        note = f"{layers} layers measured, scaled to {len(model.config.layers)}; head and optimizer not counted"
        seconds = timing.median_s * len(model.config.layers) / layers
        rows.append(Row(task, key, ids.numel() / seconds, "tok/s", timing.spread, note))
    return rows


def _training_peers(config: ModelConfig, ids: torch.Tensor) -> dict[str, tuple[int, Callable[[], object]]]:
    peers: dict[str, tuple[int, Callable[[], object]]] = {}
    hidden = torch.randn(*ids.shape, config.hidden_size)
    if find_spec("mambapy") is not None:
        from mambapy.mamba import Mamba, MambaConfig  # type: ignore[import-not-found]  # a peer

        stack = Mamba(MambaConfig(d_model=config.hidden_size, n_layers=4))
        peers["mambapy float32"] = (4, lambda: stack(hidden).sum().backward())
    if find_spec("transformers") is not None:
        from transformers import MambaConfig as HFConfig
        from transformers.models.mamba.modeling_mamba import MambaModel

        model = MambaModel(HFConfig(vocab_size=8, hidden_size=config.hidden_size, num_hidden_layers=1)).train()
        peers["transformers float32"] = (1, lambda: model(inputs_embeds=hidden).last_hidden_state.sum().backward())
    return peers


def main() -> None:
    """Measure what is asked for and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["prefill", "train", "decode", "jamba"])
    parser.add_argument("--quick", action="store_true", help="short prompts and few repetitions")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a prompt")
    options = parser.parse_args()
    repetitions, length, count = (3, 256, 8) if options.quick else (7, options.length, NEW_TOKENS)
    parts: dict[str, Callable[[], list[Row]]] = {
        "prefill": lambda: prefill_rows("mamba-130m", "mamba-130m", repetitions, length),
        "train": lambda: train_rows(repetitions),
        "decode": lambda: decode_rows("mamba-130m", "mamba-130m", repetitions, count),
        "jamba": lambda: (
            prefill_rows(JAMBA, "jamba 102M", repetitions, length)
            + decode_rows(JAMBA, "jamba 102M", repetitions, count)
        ),
    }
    for part in options.parts:
        report(
            f"cpu_{part}", parts[part](), ["statespan", "torch", "numba", "transformers", "mambapy", "llama_cpp_python"]
        )


if __name__ == "__main__":
    main()
