"""Judgements of a file of comparisons through our labelling service, for `python -m benchmarks.labeling_peers`.

The service is a process of its own with a store on disk, as `laif run` starts it.
"""

import argparse
import json
import tempfile
from pathlib import Path

from laif_jax.labeling import Endpoint, start_service
from laif_jax.records import Comparison, read_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="gets one line per judgement")
    parser.add_argument("--url", required=True)
    parser.add_argument("--critic", required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--client", choices=("sdk", "plain"), required=True)
    options = parser.parse_args()
    items = [Comparison.from_row(row) for row in read_jsonl(options.comparisons)]
    endpoint = Endpoint(
        provider="openai",
        base_url=options.url,
        model="m",
        client=options.client,
        concurrency=options.in_flight,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        start_service(folder) as service,
        service.client() as client,
    ):
        found = client.judge(endpoint, options.critic, items, order="seeded")
        answers = [judgement.raw for judgement in found]
    options.out.write_text("".join(json.dumps(answer) + "\n" for answer in answers))


if __name__ == "__main__":
    main()
