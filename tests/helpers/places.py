"""Where things are in a checkout."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # data for measuring, which need not be there
CSRC = ROOT / "csrc"
DOCS = ROOT / "docs"
TINY = TESTS / "data" / "tiny-dbrx"
GOLDEN = sorted((SHARED / "golden").glob("*.safetensors"))  # linears written by exllamav2
