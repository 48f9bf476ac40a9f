"""Tables of texts, whose tokens are computed when somebody reads them: the same prompts, filters, keys and errors."""

import datetime
import json

import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_s2d.config.data import FileSource
from megatron_s2d.config.teacher_view import TeacherViewConfig
from megatron_s2d.data import prompt_cache, prompt_table, stored_arrays, table_tokens, text_tokens
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import load_prompts, split_halves
from megatron_s2d.data.text_tokens import TextTokens
from megatron_s2d.errors import UserError
from megatron_s2d.stages.sft import SolutionSamples, solution_sample

DATE = datetime.date(2026, 1, 1)
CORPUS = ["How many apples does Leo have now?", "It has 12 apples and 3 pears.", "naïve café", "e\u0301"] * 20
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def bpe(*, normalizer=None, single="$A", template=None, without=(), added=(), digits=True, split=None, **model):
    """A byte-level tokenizer of some merges. without: characters of bytes that its vocabulary lacks."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split:
        steps = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    elif digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    if without or model:
        content = json.loads(backend.to_str())["model"]
        texts = [text for text in sorted(content["vocab"], key=content["vocab"].get) if not set(text) & set(without)]
        vocabulary = {text: index for index, text in enumerate([*texts, "<bos>"])}
        merges = [tuple(pair) for pair in content["merges"] if not set("".join(pair)) & set(without)]
        pre_tokenizer, backend = backend.pre_tokenizer, Tokenizer(models.BPE(vocabulary, merges, **model))
        backend.pre_tokenizer = pre_tokenizer
    backend.normalizer = normalizer
    backend.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<bos>", *added])
    special = [("<bos>", backend.token_to_id("<bos>")), ("<|end|>", backend.token_to_id("<|end|>"))]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=template)


KINDS = {
    "plain": {},
    "chat": {"template": TEMPLATE},
    "NFC": {"normalizer": normalizers.NFC(), "template": TEMPLATE},
    "as Qwen's": {
        "normalizer": normalizers.NFC(),
        "split": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
        "template": TEMPLATE,
    },
    "as Llama's": {"split": r"\p{L}+|\p{N}{1,3}|\s+", "single": "<bos> $A", "ignore_merges": True},
    "starts": {"single": "<bos> $A"},
    "starts and ends": {"single": "<bos> $A <|end|>"},
    "lacks bytes": {"without": "qà\u0100", "unk_token": "<bos>", "fuse_unk": True},
    "strips": {"added": [AddedToken("<mask>", lstrip=True, special=True)]},
}
TEXTS = [
    "How many apples?", "e\u0301 and \u00e9", "\u00e9 and e\u0301", "\u0958\u0958", "quick\x00\x01", "quick\x01\x00",
    "a  <mask> b", "a <mask> b", "text <|end|>", "<|end|>", "12 apples" * 9, "naïve 😀", "x", "How many apples?",
]  # fmt: skip


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return bpe(**KINDS[request.param])


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(tokenizer, rows, on_disk, limit): the prompts of rows, in memory or of a table of texts."""

    def make(tokenizer, rows, *, on_disk, limit=None, view=None, **settings):
        monkeypatch.setattr(prompt_cache, "IN_MEMORY_BYTES", 0 if on_disk else 1 << 30)
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = {"question": "question", "answer": "answer", "solution": "solution"}
        columns = {key: name for key, name in columns.items() if name in rows[0]}
        settings = {"path": path, "template": "plain", "columns": columns, **settings}
        source = FileSource.model_validate(settings)
        return load_prompts(
            source, tokenizer, max_prompt_length=limit, date=DATE, cache_dir=tmp_path / "cache", view=view
        )

    return make


def rows_of(texts, **fields):
    return [{"question": text, "answer": "1", "solution": f"so {text}", **fields} for text in texts]


def as_lists(prompts):
    return [(p.id, p.token_ids.tolist(), p.text, p.answer, p.solution_token_ids.tolist()) for p in prompts]


def test_tables_of_texts_have_the_same_prompts(load, tokenizer):
    """By iteration, by index, by id, in halves: tokens, and their dtype, as from a table in memory."""
    small, large = (load(tokenizer, rows_of(TEXTS), on_disk=on_disk).prompts for on_disk in (False, True))
    assert small.is_exact and not large.is_exact and large._table.column("token_ids").null_count == len(TEXTS)
    assert as_lists(small) == as_lists(large) == as_lists([large[index] for index in range(len(TEXTS))])
    assert large[0].token_ids.dtype == np.int64 and as_lists(large[3:5]) == as_lists(small)[3:5]
    assert as_lists(large.find(["a/3"]).values()) == as_lists(small)[3:4]
    for half, other in zip(split_halves(small, 1), split_halves(large, 1), strict=True):
        assert as_lists(half) == as_lists(other)
    assert small.lengths.tolist() == large.lengths.tolist() and large.lengths.dtype == small.lengths.dtype
    assert small.solution_lengths.tolist() == large.solution_lengths.tolist()


def test_keys_are_equal_for_equal_tokens_only(load, tokenizer):
    small, large = (load(tokenizer, rows_of(TEXTS), on_disk=on_disk).prompts for on_disk in (False, True))
    assert small.keys.tolist() == large.keys.tolist()
    tokens = [tuple(prompt.token_ids.tolist()) for prompt in small]
    equal_tokens = [[one == other for other in tokens] for one in tokens]
    assert equal_tokens == [[one == other for other in small.keys] for one in small.keys]


def test_keys_know_the_special_tokens():
    texts = pyarrow.array(TEXTS)
    keys = [TextTokens(bpe(**KINDS[kind])).keys(texts) for kind in ("plain", "chat", "starts", "starts and ends")]
    assert (
        keys[0].tolist() == keys[1].tolist() and keys[2].tolist() == keys[3].tolist() and not (keys[0] == keys[2]).any()
    )


def test_no_text_has_more_tokens_than_its_bound(tokenizer):
    tokens, texts = TextTokens(tokenizer), pyarrow.array([*TEXTS, "\u0958" * 20, "\x00q" * 9, "q\u00e9\x00"])
    assert tokens.bounded
    assert (tokens.prompt_lengths(texts) <= tokens.most_tokens(texts)).all()
    assert (tokens.solution_lengths(texts) <= tokens.most_solution_tokens(texts)).all()
    short = pyarrow.array(["x y z"])
    assert tokens.most_tokens(short)[0] - tokens.prompt_lengths(short)[0] <= 1  # no more than the end that is removed


def test_filter_at_the_boundary(load, tokenizer, monkeypatch):
    """The same prompts for every limit, and tokens of those only that may be longer and were not for a larger limit."""
    small, large = (load(tokenizer, rows_of(TEXTS), on_disk=on_disk).prompts for on_disk in (False, True))
    bounds = TextTokens(tokenizer).most_tokens(pyarrow.array(small.values("text")))
    asked, own, seen = [], TextTokens.prompt_lengths, set()
    monkeypatch.setattr(stored_arrays, "num_processes", lambda: 1)
    monkeypatch.setattr(
        table_tokens.TextTokens, "prompt_lengths", lambda self, texts: asked.append(len(texts)) or own(self, texts)
    )
    for limit in {1, 2, *small.lengths.tolist(), *bounds.tolist(), 1000}:
        expected = small.up_to(limit)
        asked.clear()
        fitting = large.up_to(limit)
        large.up_to(limit)
        larger = min((other for other in seen if other > limit), default=np.inf)
        unknown = (bounds > limit) & (bounds <= larger) & (limit not in seen)
        assert sum(asked) == unknown.sum()  # once for both
        seen |= {limit, limit - 1}  # below
        assert fitting.values("id") == expected.values("id")
        assert not fitting or expected.longest <= fitting.longest <= limit
        for prompts in (small, large, large[::-2], small[::-2]):
            indices, lengths = prompts.longer_than(limit)
            assert indices.tolist() == np.flatnonzero(prompts.lengths > limit).tolist()
            assert lengths.tolist() == prompts.lengths[indices].tolist()
        again = fitting.up_to(limit - 1)
        assert again.values("id") == small.up_to(limit - 1).values("id")
    halves = split_halves(load(tokenizer, rows_of(TEXTS), on_disk=True, limit=9).prompts, 2)
    assert [half.values("id") for half in halves] == [h.values("id") for h in split_halves(small.up_to(9), 2)]


def test_errors_are_the_same(load):
    tokenizer = bpe()
    rows = rows_of(["12345", "123456789", "1234", "987654321"])
    for settings in ({"on_long_prompt": "error", "limit": 6}, {"limit": 3}, {"on_duplicate_id": "error", "limit": 3}):
        messages = []
        for on_disk in (False, True):
            with pytest.raises(UserError) as error:
                load(tokenizer, rows, on_disk=on_disk, **settings)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    for on_disk in (False, True):
        with pytest.raises(UserError, match="prompt a/1 has 9 tokens, max_prompt_length is 6"):
            load(tokenizer, rows, on_disk=on_disk, limit=6, on_long_prompt="error")
        result = load(tokenizer, rows, on_disk=on_disk, limit=5)
        assert result.dropped_too_long == 2 and len(result.prompts) == 2
    tokenizer.eos_token = None
    for on_disk in (False, True):
        with pytest.raises(UserError, match="no end-of-sequence token to end solutions with"):
            load(tokenizer, rows, on_disk=on_disk)
    nothing = bpe(without="q", dropout=None, fuse_unk=False)  # a byte without a token, and none for unknown ones
    for on_disk in (False, True):
        with pytest.raises(UserError, match="prompt a/1 is empty"):
            load(nothing, [{"question": "x", "answer": "1"}, {"question": "qq", "answer": "1"}], on_disk=on_disk)


def test_views_with_columns(load):
    tokenizer = bpe(template=TEMPLATE)
    view = TeacherViewConfig(context="{question} knowing {solution} and {hint}")
    rows = [{**row, "hint": f"h{n}"} for n, row in enumerate(rows_of(TEXTS))]
    small, large = (load(tokenizer, rows, on_disk=on_disk, view=view).prompts for on_disk in (False, True))
    assert as_lists(small) == as_lists(large) and small.keys.tolist() == large.keys.tolist()
    assert not large.is_exact and "knowing so x and h12" in large[12].text


@pytest.mark.parametrize("change", [
    {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])},
    {"pre_tokenizer": pre_tokenizers.Metaspace()},
    {"normalizer": normalizers.NFKC()},
    {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])},
    {"model": {"dropout": 0.5}},
    {"model": {"end_of_word_suffix": "</w>"}},
])  # fmt: skip
def test_other_pipelines_are_tokenized_at_once(load, change):
    """Of which nothing is proven: their tables have tokens, as before."""
    tokenizer = bpe(digits=False, **change.pop("model", {}))
    for name, value in change.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    assert not TextTokens(tokenizer).bounded
    if tokenizer.backend_tokenizer.model.dropout is None:
        large = load(tokenizer, rows_of(["apples", "now"]), on_disk=True).prompts
        assert large.is_exact and large.lengths.tolist() == [len(prompt.token_ids) for prompt in large]


def test_a_table_of_texts_beside_one_of_tokens(load, tmp_path):
    """Entries of one stage, joined: the tokens of each, and a filter of both."""
    tokenizer = bpe()
    large = load(tokenizer, rows_of(TEXTS), on_disk=True).prompts
    small = load(tokenizer, rows_of(["one", "a much longer text"]), on_disk=False).prompts
    both = PromptTable.concatenate([large.up_to(60), small, large[2:4]])
    expected = [*large.up_to(60), *small, *large[2:4]]
    assert as_lists(both) == as_lists(expected) and not both.is_exact
    assert both.longest == max(60, small.longest, large.longest) or both.longest >= both.lengths.max()
    for limit in (0, 3, 5, 9, 60):
        assert both.up_to(limit).values("id") == [p.id for p in expected if len(p.token_ids) <= limit]


def test_samples_of_solutions_are_those_of_prompts(load, monkeypatch):
    tokenizer = bpe(template=TEMPLATE)
    small, large = (load(tokenizer, rows_of(TEXTS), on_disk=on_disk).prompts for on_disk in (False, True))
    assert large.longest_sample[0] + large.longest_sample[1] >= max(small.lengths + small.solution_lengths)
    indices, asked = [5, 0, 9, 3], []
    own = TextTokens.prompts
    monkeypatch.setattr(TextTokens, "prompts", lambda self, texts: asked.append(len(texts)) or own(self, texts))
    stored = SolutionSamples(large)
    assert stored.lengths(indices).tolist() == (small.lengths + small.solution_lengths)[indices].tolist()
    samples = stored.read(indices, [0, 1, 0, 1], 0)
    assert asked == [4]  # tokens are computed once for a batch
    expected = [solution_sample(small[index]) for index in indices]
    assert [sample.length for sample in samples] == [sample.length for sample in expected]
    assert samples[2].token_ids.tolist() == expected[2].token_ids.tolist()
    assert samples[1].response_length == expected[1].response_length


def test_missing_solutions_are_seen_without_tokens(load):
    tokenizer = bpe()
    rows = [{"question": "a", "answer": "1"}]
    assert load(tokenizer, rows, on_disk=True).prompts.has_solution.tolist() == [False]
    assert load(tokenizer, rows_of(["a"]), on_disk=True).prompts.has_solution.tolist() == [True]
    none = load(tokenizer, rows, on_disk=True).prompts
    assert none[0].solution_token_ids is None and none.solution_lengths.tolist() == [-1]


def test_lengths_are_kept_beside_the_table(load, tmp_path, monkeypatch):
    tokenizer = bpe()
    expected = load(tokenizer, rows_of(TEXTS), on_disk=True, limit=9).prompts.values("id")
    monkeypatch.setattr(prompt_table, "token_lengths", None)
    monkeypatch.setattr(text_tokens, "encode", None)
    again = load(tokenizer, rows_of(TEXTS), on_disk=True, limit=9).prompts
    assert again.values("id") == expected and again.longest <= 9
    assert [path.name for path in (tmp_path / "cache").glob("*/lengths*.npy")] == ["lengths-beyond-9.npy"]
