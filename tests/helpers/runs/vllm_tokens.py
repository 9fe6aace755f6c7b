"""A program that has vLLM continue prompts greedily: `vllm_tokens.py ASKED.json ANSWERS.json`.

ASKED has `prompts`, token ids of each, `count`, tokens of each answer, and `options` of the engine; ANSWERS
becomes the token ids of the answers. A process of its own, since an engine does not leave a process clean.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def vllm_tokens(folder, work, prompts, count, activations="float", **options):
    """The answers [len(prompts), count] of a folder, in float32 and not compiled unless `options` say so."""
    asked, answers = work / "asked.json", work / "answers.json"
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 32} | options
    asked.write_text(
        json.dumps({"prompts": prompts, "count": count, "options": {"model": str(folder)} | options})
    )
    ranks = options.get("tensor_parallel_size", 1)
    environment = (
        vllm_environment()
        | {"DBRXQ_ACTIVATIONS": activations}
        | ({"VLLM_CPU_OMP_THREADS_BIND": "|".join("01")} if ranks == 2 else {})
    )
    with (work / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, __file__, str(asked), str(answers)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=1200,
            check=False,
        )
    assert done.returncode == 0, (work / "log").read_text()[-6000:]
    return json.loads(answers.read_text())


def vllm_environment():
    """For vLLM on a small machine without a network, with activations as exact as ours in tests."""
    return os.environ | {
        "DBRXQ_ACTIVATIONS": "float",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def main():
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(**asked["options"])
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=asked["count"], ignore_eos=True)
    answers = [list(one.outputs[0].token_ids) for one in engine.generate(prompts, greedy, use_tqdm=False)]
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
