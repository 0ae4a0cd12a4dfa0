"""What a judgement says of its comparison, so that a store can tell how good its labels are without the texts."""

import hashlib
from typing import Any

from laif_jax.records import Comparison, Judgement


def pair_facts(comparison: Comparison) -> dict[str, Any]:
    """`prompt`: its id; `generators`; `chars`: lengths in characters; `texts`: short hashes, equal for equal texts."""
    sides = (comparison.a, comparison.b)
    return {
        "prompt": comparison.prompt.id,
        "generators": [side.generator for side in sides],
        "chars": [len(side.text) for side in sides],
        "texts": [text_name(side.text) for side in sides],
    }


def text_name(text: str) -> str:
    """Ten hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def told(judgement: Judgement, comparison: Comparison) -> Judgement:
    """The judgement, just made and still its maker's alone, with the facts of its comparison put into `meta.pair`."""
    judgement.meta["pair"] = pair_facts(comparison)
    return judgement
