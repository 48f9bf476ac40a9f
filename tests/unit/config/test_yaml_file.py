"""YAML that is ambiguous, recursive or too large is refused with the file and the line."""

from pathlib import Path

import pytest
import yaml

from megatron_s2d.config import yaml_file
from megatron_s2d.config.base import apply_overrides
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.config.yaml_file import load_yaml, parse_yaml
from megatron_s2d.errors import UserError

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", r"file.yaml:3: the key 'a' appears in lines 1 and 3"),
        (b"s:\n  x: {k: 1, k: 2}\n", r"file.yaml:2: the key 'k' appears in lines 2 and 2"),
        (b"a: 1\nb: .inf\n", r"file.yaml:2: .inf is not a finite number"),
        (b"b: -.INF\n", r"file.yaml:1: -.INF is not a finite number"),
        (b"b: .nan\n", r"file.yaml:1: .nan is not a finite number"),
        (b"a: 1\nb: \xff\xfe\n", r"file.yaml:2: not UTF-8 text"),
        (b"a: " + b"[" * 100_000, r"file.yaml:1: nested deeper than 50 levels"),
        (b"a: &x {b: *x}\n", r"file.yaml:1: the anchor 'x' contains itself"),
        (b"a: &x [*x]\n", r"file.yaml:1: the anchor 'x' contains itself"),
        (LAUGHS.encode(), r"file.yaml:\d+: more than 200,000 values once aliases are expanded"),
        (b"a: 2026-13-45\n", r"file.yaml: not valid YAML \(month must be in 1..12"),
        (b"? [1, 2]\n: 3\n", r"file.yaml:1: not valid YAML \(found unhashable key"),
        (b"on: 3\n", r"file.yaml: the key True is not text; write it in quotes"),
        (b"a: {\n", r"file.yaml:2: not valid YAML"),
        (b"- 1\n", r"file.yaml: expected a mapping of configuration keys, not a list"),
        (b"a: !!python/object/apply:os.system [ls]\n", r"file.yaml:1: not valid YAML \(could not determine"),
        (b"x: " + b"a" * (11 * 2**20), r"file.yaml: larger than 10 MiB"),
    ],
)
def test_invalid_yaml_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)


def test_anchors_merge_keys_and_byte_order_mark(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\nc: *x\nd: {<<: *x, m: 4}\n")
    x = {"k": 1, "l": 2}
    assert load_yaml(path) == {"a": x, "b": x | {"k": 3}, "c": x, "d": x | {"m": 4}}


def test_invalid_override_is_a_one_line_error():
    with pytest.raises(UserError, match=r"^--set a=\[1:1: not valid YAML"):
        apply_overrides({}, ["a=[1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=true", "seed: expected a number, got true"),
        ("stages.opd.steps=false", "stages.opd.steps: (Input should be greater|expected a number)"),
        ("stages.opd.optimizer.weight_decay=true", "weight_decay: expected a number, got true"),
        ("seed=1000000000000000000000000000000", "seed: 1e+30 is more than anything counted here"),
        ("stages.opd.train_batch_size=1000000000000000000", "1e+18 is more than anything counted here"),
        ("stages.opd.optimizer.lr=1.0e+300", "is too large for float32 arithmetic"),
        ("stages.opd.optimizer.lr=3.0", "less than or equal to 1"),
        ("stages.opd.optimizer.lr=1e300", "less than or equal to 1"),
        ("stages.opd.sampling.temperature=1e20", "temperature: .*is above 100: above that tokens are drawn"),
        ("stages.opd.sampling.temperature=1e300", "temperature: .* is too large for float32"),
        ("stages.opd.steps=1000000000", "stages.opd.steps: 1,000,000,000 is above 10,000,000: at a step a second"),
        ("stages.opd.num_generations=1000000", "num_generations: 1,000,000 is above 10,000"),
        (
            "stages.teacher_base.global_batch_size=1000000000",
            "every rank has a record of each sample of a step in memory",
        ),
        ("evaluation.samples_per_prompt=1000000000", "every sample is stored and graded"),
        ("evaluation.eval_batch_size=1000000000", "every rank has a record of each sample"),
        ("lengths.max_prompt_length=1000000000", "longer than the context of any model"),
        ("threads_per_rank=1000000", "no machine has that many cores"),
        ("max_parallel_stages=1000000", "each has its own processes"),
        ("stages.opd.optimizer.weight_decay=1000", "weights would vanish"),
        ("pass_rate_checks=[{stage: rl_teacher, prompts: pool, low: 0.9, high: 0.1}]", "low 0.9 is above high 0.1"),
        ("contrasts.0.b=half_bridge_stage3", "has no keys below it"),
        ("contrasts=[{a: half_bridge_stage3, b: half_bridge_stage3, factor: x}]", "with itself"),
    ],
)
def test_implausible_numbers_are_refused(override, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        load_workflow(SMOKE, [override])


@pytest.mark.parametrize(
    "name", ["../../x", "..", "", "/tmp/x", ".archive", "a/b", "a b", "x" * 300, "a\nb", "-x", "ü"]
)
@pytest.mark.parametrize("kind", ["name", "stages", "arms", "models", "data", "role", "domain"])
def test_names_of_files_have_one_pattern(tmp_path, name, kind):
    document = load_yaml(SMOKE)
    if kind == "name":
        document["name"] = name
    elif kind == "role":
        document["stages"]["cache"]["role"] = name
    elif kind == "domain":
        document["data"]["pool"]["domain"] = name
    else:
        document[kind][name] = next(iter(document[kind].values()))
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match="cannot name files: use letters"):
        load_workflow(path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{16: a, 0x10: b}", "16"),
        ("{10: a, 1_0: b}", "10"),
        ("{1: a, '1': b}", "1"),
        ("{1.0: a, 1.00: b}", "1.0"),
        ("x: &a {k: 1}\ny: {<<: *a, <<: {k: 2}}", "<<"),
    ],
)
def test_keys_of_equal_value_are_duplicates(text, key):
    with pytest.raises(UserError, match=f"the key '{key}' appears in lines . and .; keep one of them"):
        parse_yaml(text, "file.yaml")


def test_bounds_are_of_settings_and_not_of_names(tmp_path):
    """Columns, models and stages may have the names of settings."""
    document = load_yaml(SMOKE)
    source = {"type": "file", "path": "x.jsonl", "min_values": {"temperature": 500, "steps": 10**9}}
    document["data"]["steps"] = source
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(document))
    assert load_workflow(path).data["steps"].min_values["steps"] == 10**9


@pytest.mark.skipif(len(yaml_file._LOADERS) < 2, reason="PyYAML was built without libyaml")
@pytest.mark.parametrize("text", [
    (Path(__file__).parents[3] / "configs" / "smoke.yaml").read_text(),
    "a: {b: [1, 2.5, 1e3, 1.0e-3, 0x1F, 0o17, 017, 1_000, -0, +3, .5, ~, null, yes, on, True, 'no', \"\\u00e4\"]}",
    "x: &x {y: 2026-01-01, z: 2026-01-01 10:00:00}\nu: *x\nw: {<<: *x, y: 3}\n",
    "t: |\n  line\n\n  other\nf: >-\n  folded\n  text\nu: ä😀\n? key\n: value\n",
    "# nothing", "--- a\n...\n", "'a''b': \"c\\td\"", "url: http://a.b:80/c#d",
])  # fmt: skip
def test_both_parsers_give_the_same_values(text):
    fast, slow = (repr(make(text).get_single_data()) for make in yaml_file._LOADERS)
    assert fast == slow


def test_a_message_has_the_words_of_one_parser():
    with pytest.raises(UserError, match=r"test:1: not valid YAML \(expected ',' or '\]', but got '<stream end>'\)"):
        parse_yaml("a: [1", "test")
