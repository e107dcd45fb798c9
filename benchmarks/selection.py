"""Measure time and peak memory of `mof vig select` and `mof vig report` on a million made-up scores and their records.

    python benchmarks/selection.py                     # a million scores of about 30 answer tokens
    python benchmarks/selection.py --count 100000

Each command runs in a separate process, so that its peak memory can be read (from Linux's /proc). The line "import" shows a process that
imports the same modules and does nothing else. Wall-clock times mean little on shared cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from encoders.digests import file_digest
from encoders.tables import write_table
from encoders.whole_files import write_text
from mof.data.digests import digest
from vig.processes import Processes
from vig.scoring.folder import RECORDS_DIGEST, ScoreFolder
from vig.scoring.score_table import SCHEMA

SHARD = 4096  # rows of a shard
WORDS = "a the red blue dog cat left right of on table two three small large there is are man woman street sky not"
IDENTITY = {"null": {"name": "blur"}, "seed": 0, "max_length": 2048, "model": "Made", "versions": {}}
IDENTITY |= dict.fromkeys(("weights", "config", "tokenizer", "chat_template"), "0")

COMMANDS = {
    "import": "import vig.cli.select, vig.cli.report",
    "select": "from vig.cli.select import select; select(scores=folder / 'scores', records=records, output=folder / 'selected.json')",
    "report": "from vig.cli.report import report; report([folder / 'scores'], records, folder / 'report.html', source_key='source')",
}
MEASURED = """
import re, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
records = folder / "records.jsonl"
start = time.monotonic()
{command}
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())  # ru_maxrss would begin with the parent's memory
print("measured", time.monotonic() - start, time.process_time(), int(peak[1]) / 2**20)
"""


def make(folder: Path, count: int) -> None:
    """Write records.jsonl and the folder of the records' scores."""
    rng = np.random.default_rng(0)
    lines = []
    with ScoreFolder(folder / "scores", IDENTITY, SCHEMA, Processes()) as scores:
        path, run = scores.shard
        for number, start in enumerate(range(0, count, SHARD)):
            records = [record(rng, index) for index in range(start, min(start + SHARD, count))]
            lines += [json.dumps(raw) for raw in records]
            write_table(Path(path.format(number)), pa.table(columns(rng, records), schema=SCHEMA), run)
        write_text(folder / "records.jsonl", "\n".join(lines) + "\n")
        scores.finish([], {}, {RECORDS_DIGEST: file_digest(folder / "records.jsonl")})


def record(rng: np.random.Generator, index: int) -> dict:
    answer = " ".join(rng.choice(WORDS.split(), rng.integers(5, 50)))
    turns = [{"from": "human", "value": "<image>\nWhat is there in the picture?"}, {"from": "gpt", "value": answer}]
    return {"id": f"record-{index:07d}", "image": f"coco/{index:012d}.jpg", "source": f"s{index % 7}", "conversations": turns}


def columns(rng: np.random.Generator, records: list[dict]) -> dict[str, list]:
    answers = [raw["conversations"][1]["value"].split() for raw in records]
    token_vig = [rng.normal(0.2, 1, len(words) + 1).astype(np.float32) for words in answers]
    ends = [np.cumsum([len(word) + 1 for word in words] + [0]) for words in answers]
    vig = [values.mean() for values in token_vig]
    return {
        "id": [raw["id"] for raw in records], "digest": [digest(raw) for raw in records], "vig": vig, "loss": vig, "null_loss": vig,
        "token_vig": token_vig, "token_ids": [np.arange(len(values)) for values in token_vig],
        "turn_ends": [[len(words)] for words in answers], "answer": [" ".join(words) + " " for words in answers],
        "token_starts": [np.append(0, end[:-1]) for end in ends], "token_ends": ends,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="folder in which the made-up scores are kept, to be used again")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "records.jsonl").is_file():
            start = time.monotonic()
            make(folder, args.count)
            print(f"{args.count:,} scores made in {time.monotonic() - start:.0f} s")
        for name in args.commands:
            code = MEASURED.format(command=COMMANDS[name])
            run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, env=os.environ)
            seconds, cpu, memory = map(float, run.stdout.splitlines()[-1].split()[1:])
            print(f"{name:8} {seconds:7.1f} s  {cpu:7.1f} s of CPU  {memory:5.2f} GB", flush=True)


if __name__ == "__main__":
    main()
