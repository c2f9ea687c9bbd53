"""The paper's requests from their definition, apart from the package: the golden file's source.

``python -m tests.support.paper_requests DATA`` writes it, of a folder with ``tokenizer/`` and
``eval/``. A request is hashed as JSON ``[id, choice, scored_from, tokens]``, 12 hex digits of
SHA-256; a task's hash is of all its requests' hashes in a row."""

import hashlib
import json
import os
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer

from tests.support import ROOT

DATA = Path(os.environ.get("SISA_DATA", ROOT.parent / "shared" / "data"))
TOKENIZER = "tokenizer/gpt-neox-20b.json"
GOLDEN = ROOT / "tests" / "evaluation" / "paper_requests.json"
FIRST = 300  # requests hashed one by one


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hash_request(number, choice, scored_from, tokens):
    return short_hash(json.dumps([number, choice, scored_from, tokens]))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def winogrande(encode, data):
    """The sentence with the option in place of _; every token but the first is scored."""
    for number, row in enumerate(read_lines(data / "eval" / "winogrande_xl_validation.jsonl")):
        before, after = row["sentence"].split("_")
        for choice, option in enumerate([row["option1"], row["option2"]]):
            yield number, choice, 1, encode(before + option + after)[-2048:]


def arc_easy(encode, data):
    """The bare question, then " " and a choice, tokenised apart; not with a fifth key as the right.

    A to D or 1 to 4 are indices 0 to 3."""
    for number, row in enumerate(read_lines(data / "eval" / "arc_easy_test.jsonl")):
        if row["label"] > 3:
            continue
        for choice, text in enumerate(row["choices"]):
            question, answer = encode(row["question"]), encode(" " + text)
            tokens = (question + answer)[-2048:]
            yield number, choice, len(tokens) - len(answer), tokens


def niah(encode, data):
    """200 trials of each of five seeds in a context of 512."""
    secrets = [
        ("The secret code is", "ALPHA"),
        ("The password is", "BRAVO"),
        ("The answer is", "CHARLIE"),
        ("The key number is", "DELTA"),
        ("The magic word is", "ECHO"),
    ]
    filler = encode("The quick brown fox jumps over the lazy dog. " * 50)
    number = 0
    for seed in (42, 123, 456, 789, 1024):
        random.seed(seed)
        for _ in range(200):
            key, value = random.choice(secrets)
            needle, question = encode(key + " " + value + "."), encode(" " + key)
            free = 512 - len(needle) - len(question) - 10
            position = random.randint(5, free // 2)
            tokens = filler[:position] + needle + filler[: free - position] + question
            yield number, 0, len(tokens), [*tokens, encode(" " + value)[0]]
            number += 1


TASKS = {"winogrande": winogrande, "arc_easy": arc_easy, "niah": niah}


def make(data):
    """task -> number of requests, hash of all, hashes of the first."""
    tokenizer = Tokenizer.from_file(str(data / TOKENIZER))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    found = {}
    for task, requests in TASKS.items():
        hashes = [hash_request(*request) for request in requests(encode, data)]
        found[task] = {
            "requests": len(hashes),
            "all": short_hash("".join(hashes)),
            "first": " ".join(hashes[:FIRST]),
        }
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make(Path(sys.argv[1])), indent=0) + "\n")
