"""What the tests of `upload` publish, and how they read what was sent."""

import json

from measurements import linear, measurement

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
STRATEGY = {"target_bpw": 3.0, "bpw": 3.3, "predicted_kl": 0.04, "linears": {}, "notes": []}
OPTIONS = [(2000, 0.3, "2:32"), (3000, 0.1, "3:32"), (4000, 0.02, "4:32"), (6000, 0.001, "6:32")]
MEASURED = measurement({"a": linear((32, 32), OPTIONS), "lm_head": linear((32, 32), OPTIONS, "head")})


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def retarget(folder, bits):
    """Say that a folder was made for another target, which is all that an upload looks at."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["bits"] = bits
    write_json(path, config)
    write_json(folder / "strategy.json", {**STRATEGY, "target_bpw": bits, "predicted_kl": 0.12 / bits})


def sent(output):
    """Branch → the files that were sent to it, from the JSON that was printed."""
    return {branch["branch"]: branch["sent"] for branch in json.loads(output)["branches"]}
