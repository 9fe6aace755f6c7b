"""What the tests of `upload` publish, and how they read what was sent."""

import json

from measurements import linear, measurement

from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.folder.sizes import linear_bits, stored_bits

REPO = "me/tiny-exl2"
BASE = "databricks/tiny"
CARD = """---
license: other
license_name: databricks-open-model-license
license_link: https://www.databricks.com/legal/open-model-license
extra_gated_heading: Share your contact information
extra_gated_prompt: |
  ### Terms

  Use is governed by the licence.
extra_gated_fields:
  Name: text
  I accept: checkbox
language: no
---
# Tiny

Made for tests.
"""
ERRORS = {2: 0.3, 3: 0.1, 4: 0.02, 6: 0.001}


def measured_of(folder):
    """A measurement of the linears of a quantized folder."""
    found = {}
    for spec in describe(load_config(folder)).linears():
        k, n = spec.shape
        options = [(k * n * bits, error, f"{bits}:{k}") for bits, error in ERRORS.items()]
        found[spec.name] = linear(spec.shape, options, "head" if spec.name == "lm_head" else "q")
    return measurement(found)


def strategy_of(folder, target=3.0, kl=0.04):
    """The strategy.json of a quantized folder, whatever it was made for."""
    architecture = describe(load_config(folder))
    checkpoint = architecture.open(folder)
    linears = {
        spec.name: {"bits": linear_bits(checkpoint, spec), "error": 0.1, "groups": f"3:{spec.shape[0]}"}
        for spec in architecture.linears()
    }
    facts = {"target_bpw": target, "bpw": stored_bits(checkpoint, architecture).bpw, "predicted_kl": kl}
    return {**facts, "linears": linears, "notes": []}


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def retarget(folder, bits):
    """Say that a folder was made for another target, which is all that an upload looks at."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["bits"] = bits
    write_json(path, config)
    write_json(folder / "strategy.json", strategy_of(folder, bits, 0.12 / bits))


def sent(output):
    """Branch → the files that were sent to it, from the JSON that was printed."""
    return {branch["branch"]: branch["sent"] for branch in json.loads(output)["branches"]}
