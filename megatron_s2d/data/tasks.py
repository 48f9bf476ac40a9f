"""The embedded task: generated, verifiable problems of a start value in Z_p and k operations, worked step by step.

Prompt ``v op d op d ... =``, response ``r1 ... rk [ rk ]`` and the end token; every residue is one token. The corpus
for base training is noisy in ways that a model learns: some facts (op, v, d) are misconceptions, stated mostly with
one fixed wrong result, others are wrong occasionally, and some documents answer without the steps. A model trained on
it gives the correct answer with low probability, so that a sparse reward can improve it.

With ``call_fraction`` some documents work by calls of the calculator (``v op d = r1 op d = r2 ... [ rk ] <eos>``),
whose results are as noisy as the others: a model learns the form of a call from them, and right results from the
calculator only (``rollout/environments/calculator.py``).

Problems are numbered; the splits are residue classes of a bijective hash of the number, so no problem is in two.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from megatron_s2d.config.data import TaskSource
from megatron_s2d.config.environment import environment_text
from megatron_s2d.config.reward import verifier_text
from megatron_s2d.config.teacher_view import TeacherViewConfig
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt

OPERATORS = ("+", "-", "*")
MAX_OPERAND = 9
_SPLIT_CLASSES = {
    "pool": (0, 40),
    "heldout": (40, 60),
    "eval": (60, 80),
    "corpus": (80, 100),
}  # ranges of 100 hash classes
_BLOCK = 256  # corpus documents drawn together
_MISCONCEPTIONS, _PROBLEMS, _DOCUMENTS = range(3)  # random number streams


def tokens_of(modulus: int) -> list[str]:
    """Return the vocabulary: residues, operators, brackets and the two special tokens."""
    # Operands 1 to 9 are written like residues; a small modulus needs tokens for the larger ones.
    numbers = [str(value) for value in range(max(modulus, MAX_OPERAND + 1))]
    return ["<pad>", "<eos>", *numbers, *OPERATORS, "=", "[", "]"]


def task_prompts(source: TaskSource, tokenizer, view: TeacherViewConfig | None = None) -> list[Prompt]:
    """Return the labelled problems of a split in the order of drawing, a function of the settings only.

    view: as a teacher reads them; only ``context`` applies, since prompts of the task have no messages.
    """
    if source.split == "corpus":
        raise UserError("split corpus has documents, not prompts; choose pool, heldout or eval")
    rng = np.random.default_rng([source.seed, _PROBLEMS, *source.split.encode()])
    numbers = _draw(source, rng, source.num_prompts)
    values, operators, operands = _decode(source, numbers)
    results = _work(source.modulus, values, operators, operands)
    encode, table = _encoder(tokenizer, source.modulus), _table(tokenizer, source.modulus)
    environment = source.resolved_environment
    # A problem with an environment is another one than without: both may be in one evaluation.
    kind = "modular_arithmetic" if environment is None else f"modular_arithmetic+{environment.type}"
    prompts = []
    for row, number in enumerate(numbers.tolist()):
        words, id_ = _words(values[row], operators[row], operands[row]), f"{kind}/{source.split}/{number}"
        if view is not None:
            words = _in_view(view, id_, words, _solution_words(results[row]), table)
        prompts.append(
            Prompt(
                id=id_,
                token_ids=encode(words),
                text=" ".join(words),
                domain=source.domain,
                verifier=verifier_text(source.verifier),
                answer=str(results[row, -1]),
                solution_token_ids=encode([*_solution_words(results[row]), "<eos>"]),
                environment=environment_text(environment),
            )
        )
    return prompts


def with_context(view: TeacherViewConfig, values: Mapping[str, str | None], id_: str) -> str:
    """Return the user's message of problem ``id_`` in a view. values: field -> its text; None: the row has none."""
    for field in sorted(view.fields):
        if values.get(field) is None:
            raise UserError(f"context of a teacher's view: prompt {id_} has no {field}; name its column in `columns`")
    return str(view.context).format(**values)


def _in_view(
    view: TeacherViewConfig, id_: str, words: list[str], solution: list[str], table: Mapping[str, int]
) -> list[str]:
    if view.system_prompt is not None or view.enable_thinking:
        raise UserError("a teacher's view of the task modular_arithmetic has a context only: it has no messages")
    if view.context is None:
        return words
    question = " ".join(words)
    values = {"prompt": question, "question": question, "answer": solution[-2], "solution": " ".join(solution)}
    result = with_context(view, values, id_).split()
    unknown = [word for word in result if word not in table]
    if unknown:
        raise UserError(f"context of a teacher's view: {unknown[0]!r} is no word of the task ({' '.join(table)})")
    return result


def task_documents(source: TaskSource, tokenizer, start: int, count: int) -> list[Prompt]:
    """Return documents ``start`` to ``start + count`` of the endless noisy corpus, each a function of its number."""
    encode = _encoder(tokenizer, source.modulus)
    documents = []
    for index in range(start, start + count):
        block = _document_block(source, index // _BLOCK)
        words, solution = block[index % _BLOCK]
        documents.append(
            Prompt(
                id=f"modular_arithmetic/corpus/{source.seed}/{index}",
                token_ids=encode(words),
                text=" ".join(words),
                domain=source.domain,
                verifier=None,
                answer=None,
                solution_token_ids=encode(solution),
            )
        )
    return documents


def check_answer(response: str, answer: str) -> tuple[float, str]:
    """Return (1.0, "correct") for exactly one correct bracketed answer at the very end, else 0.0 and the reason."""
    words = response.split()
    if "[" not in words:
        return 0.0, "no_answer"
    if words.count("[") > 1:
        return 0.0, "several_answers"
    if words.count("]") != 1 or words[-1] != "]" or len(words) < 3 or words[-3] != "[":
        return 0.0, "malformed"
    return (1.0, "correct") if words[-2] == answer else (0.0, "wrong")


@functools.lru_cache(maxsize=16)
def _document_block(source: TaskSource, block: int) -> list[tuple[list[str], list[str]]]:
    """Return (prompt words, solution words) of the documents of one block."""
    rng = np.random.default_rng([source.seed, _DOCUMENTS, block])
    numbers = _draw(source, rng, _BLOCK)
    values, operators, operands = _decode(source, numbers)
    stated = _work(source.modulus, values, operators, operands, noise=(source, rng))
    direct = rng.random(_BLOCK) < source.direct_fraction
    calls = rng.random(_BLOCK) < source.call_fraction
    documents = []
    for row in range(_BLOCK):
        solution = _solution_words(stated[row])
        if calls[row]:
            solution = [*_call_words(values[row], operators[row], operands[row], stated[row]), *solution[-3:]]
        documents.append(
            (
                _words(values[row], operators[row], operands[row]),
                [*(solution[-3:] if direct[row] else solution), "<eos>"],
            )
        )
    return documents


def _num_problems(source: TaskSource) -> int:
    return source.modulus * (len(OPERATORS) * MAX_OPERAND) ** source.num_operations


def _draw(source: TaskSource, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw ``count`` distinct problem numbers of the split."""
    low, high = _SPLIT_CLASSES[source.split]
    share = (len(set(source.operators)) / len(OPERATORS)) ** source.num_operations
    available = int(_num_problems(source) * (high - low) / 100 * share)
    if count > available // 2:
        raise UserError(
            f"num_prompts {count} is too large: split {source.split} of modulus {source.modulus} with "
            f"{source.num_operations} operations has about {available} problems; use at most half, "
            "or more num_operations"
        )
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        numbers = rng.integers(0, _num_problems(source), size=8 * count, dtype=np.int64)
        classes = _hash(numbers) % 100
        numbers = numbers[(classes >= low) & (classes < high)]
        drawn.update(dict.fromkeys(numbers[_has_operators(source, numbers)].tolist()))
    return np.array(list(drawn)[:count], dtype=np.int64)


def _has_operators(source: TaskSource, numbers: np.ndarray) -> np.ndarray:
    """Return a mask [n] of the problems that use only the source's operators."""
    _, operators, _ = _decode(source, numbers)
    return np.isin(operators, [OPERATORS.index(operator) for operator in source.operators]).all(axis=1)


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers (the finaliser of splitmix64)."""
    mixed = numbers.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _decode(source: TaskSource, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode problem numbers [n] to start values [n], operator indices [n, k] and operands [n, k]."""
    remaining, values = np.divmod(numbers, source.modulus)
    choices = []
    for _ in range(source.num_operations):
        remaining, choice = np.divmod(remaining, len(OPERATORS) * MAX_OPERAND)
        choices.append(choice)
    choice = np.stack(choices, axis=1)
    return values, choice // MAX_OPERAND, choice % MAX_OPERAND + 1


def _work(
    modulus: int,
    values: np.ndarray,
    operators: np.ndarray,
    operands: np.ndarray,
    noise: tuple[TaskSource, np.random.Generator] | None = None,
) -> np.ndarray:
    """Return the results after each operation [n, k]; with ``noise`` those of the corpus (errors propagate)."""
    current, results = values, []
    for step in range(operators.shape[1]):
        operator, operand = operators[:, step], operands[:, step]
        true = (
            np.select([operator == 0, operator == 1], [current + operand, current - operand], current * operand)
            % modulus
        )
        if noise is not None:
            source, rng = noise
            fixed = _misconceptions(source)[operator, current, operand - 1]
            wrong = np.where(fixed >= 0, fixed, (true + rng.integers(1, modulus, size=true.shape)) % modulus)
            rate = np.where(fixed >= 0, source.misconception_rate, source.error_rate)
            true = np.where(rng.random(true.shape) < rate, wrong, true)
        current = true
        results.append(current)
    return np.stack(results, axis=1)


@functools.lru_cache(maxsize=16)
def _misconceptions(source: TaskSource) -> np.ndarray:
    """Return the fixed wrong result of every fact [operator, value, operand - 1]; -1 for a fact without one."""
    rng = np.random.default_rng([source.world_seed, _MISCONCEPTIONS])
    shape = (len(OPERATORS), source.modulus, MAX_OPERAND)
    value, operand = np.arange(source.modulus)[:, None], np.arange(1, MAX_OPERAND + 1)[None, :]
    true = np.stack([value + operand, value - operand, value * operand]) % source.modulus
    wrong = (true + rng.integers(1, source.modulus, size=shape)) % source.modulus
    return np.where(rng.random(shape) < source.misconception_fraction, wrong, -1)


def _words(value: int, operators: np.ndarray, operands: np.ndarray) -> list[str]:
    words = [str(value)]
    for operator, operand in zip(operators, operands, strict=True):
        words += [OPERATORS[operator], str(operand)]
    return [*words, "="]


def _solution_words(results: np.ndarray) -> list[str]:
    words = [str(result) for result in results]
    return [*words, "[", words[-1], "]"]


def _call_words(value: int, operators: np.ndarray, operands: np.ndarray, results: np.ndarray) -> list[str]:
    words, current = [], value
    for operator, operand, result in zip(operators, operands, results, strict=True):
        words += [str(current), OPERATORS[operator], str(operand), "=", str(result)]
        current = result
    return words


def _encoder(tokenizer, modulus: int):
    """Return a function from words to int64 token ids, much faster than the tokenizer."""
    table = _table(tokenizer, modulus)
    return lambda words: np.array([table[word] for word in words], dtype=np.int64)


def _table(tokenizer, modulus: int) -> dict[str, int]:
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in tokens_of(modulus) if word not in vocabulary]
    if missing:
        raise UserError(
            f"the tokenizer has no token '{missing[0]}': the task modular_arithmetic with modulus {modulus} needs "
            f"tokenizer: task:modular_arithmetic{'' if modulus == 17 else f'/{modulus}'}"
        )
    return vocabulary
