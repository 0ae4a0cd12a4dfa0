"""The same prompts through distilabel's own pipeline, for `python -m benchmarks.labeling_peers`; run by an interpreter
that has distilabel.

`ChatGeneration` over `OpenAILLM`; a batch of `input_batch_size` prompts is asked at once, and the next one when all of
it is answered.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=Path, required=True, help="one list of chat messages per line")
    parser.add_argument("--out", type=Path, required=True, help="gets one answer per line")
    parser.add_argument("--url", required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DISTILABEL_CACHE_DIR"] = cache
        from datasets import Dataset
        from distilabel.models import OpenAILLM
        from distilabel.pipeline import Pipeline
        from distilabel.steps.tasks import ChatGeneration

        lines = options.messages.read_text().splitlines()
        rows = [{"number": number, "messages": json.loads(line)} for number, line in enumerate(lines)]
        with Pipeline(name="judge", cache_dir=cache) as pipeline:
            llm = OpenAILLM(
                model="m",
                base_url=options.url,
                api_key="none",
                generation_kwargs={"temperature": 0.0, "max_new_tokens": options.max_tokens},
            )
            ChatGeneration(name="judge", llm=llm, input_batch_size=options.in_flight)
        found = pipeline.run(
            dataset=Dataset.from_list(rows), use_cache=False, dataset_batch_size=options.in_flight
        )
        answers = {row["number"]: row["generation"] for row in found["default"]["train"]}
    options.out.write_text("".join(json.dumps(answers.get(n)) + "\n" for n in range(len(rows))))


if __name__ == "__main__":
    main()
