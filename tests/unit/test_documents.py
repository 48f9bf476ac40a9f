"""Documents against the code: configurations parse, names and paths exist, links resolve, figures are reproduced."""

from __future__ import annotations

import functools
import importlib.util
import re
import types
import typing
from pathlib import Path

import pydantic
import pytest
import yaml

from megatron_s2d.config.base import Config, parse
from megatron_s2d.config.migration import SIMULATION_KEYS, SWEEP_KEYS, WORKFLOW_KEYS
from megatron_s2d.config.simulation import SimulationConfig
from megatron_s2d.config.sweep import SweepConfig
from megatron_s2d.config.teacher_service import ServeTeacherConfig
from megatron_s2d.config.workflow import WorkflowConfig, load_workflow
from megatron_s2d.launchers.config import LaunchConfig

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS = ("megatron_s2d", "conversion", "launchers", "benchmarks", "tests", "configs", "docs")
SUFFIXES = {".py", ".yaml", ".toml", ".md", ".sh", ".html", ".txt"}

# The word after ```yaml says which file the block is, or is a part of.
FILES = {
    "": WorkflowConfig,
    "cluster": LaunchConfig,
    "sweep": SweepConfig,
    "simulation": SimulationConfig,
    "teacher": ServeTeacherConfig,
}
BLOCK = re.compile(r"^```yaml *(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def document_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def yaml_blocks() -> list:
    blocks = []
    for path in DOCUMENTS:
        for index, (kind, text) in enumerate(BLOCK.findall(path.read_text())):
            blocks.append(pytest.param(kind, text, id=f"{document_id(path)}-{index}"))
    return blocks


@pytest.mark.parametrize("kind, text", yaml_blocks())
def test_yaml_in_documents_has_keys_and_values_of_the_configuration(kind, text, tmp_path):
    document, model = yaml.safe_load(text), FILES[kind]
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    if model is WorkflowConfig and required <= set(document):
        (tmp_path / "workflow.yaml").write_text(text)
        load_workflow(tmp_path / "workflow.yaml")
    elif required and required <= set(document):
        parse(model, document, "block")
    else:  # a fragment
        assert not list(problems(model, document))


def problems(annotation, value, path: str = ""):
    """Yield what is wrong with a part of a configuration file: unknown keys, and values that do not validate."""
    options = alternatives(annotation)
    if not isinstance(value, dict):
        try:
            pydantic.TypeAdapter(annotation).validate_python(value)
        except pydantic.ValidationError as error:
            yield f"{path}: {error.errors()[0]['msg']}"
        return
    results = []
    for option in options:
        if isinstance(option, type) and issubclass(option, Config):
            fields = {field.alias or name: field for name, field in option.model_fields.items()}
            unknown = [f"{path}.{key}: unknown key" for key in value if key not in fields]
            wrong = [
                p
                for key in set(value) & set(fields)
                for p in problems(fields[key].annotation, value[key], f"{path}.{key}")
            ]
            results.append(unknown + wrong)
        elif typing.get_origin(option) is dict:
            inner = typing.get_args(option)[1]
            results.append([p for key, item in value.items() for p in problems(inner, item, f"{path}.{key}")])
    yield from min(results, key=len, default=[f"{path}: takes no mapping"])


def alternatives(annotation) -> list:
    """Return the members of a union, of nested and annotated ones too."""
    if isinstance(annotation, typing.TypeAliasType):
        return alternatives(annotation.__value__)
    if typing.get_origin(annotation) is typing.Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [option for member in typing.get_args(annotation) for option in alternatives(member)]
    return [annotation]


def test_unknown_keys_and_values_of_a_fragment_are_noticed():
    assert list(problems(WorkflowConfig, {"rollout": {"sglang": {"replica": 2}}}))
    assert list(problems(WorkflowConfig, {"stages": {"a": {"kl_estimator": "full"}}}))
    assert not list(problems(WorkflowConfig, {"stages": {"a": {"kl_estimator": "full_vocab"}}}))


def test_the_example_of_the_readme_is_a_shipped_workflow():
    (example,) = [text for _, text in BLOCK.findall((ROOT / "README.md").read_text())]
    assert example == (ROOT / "configs/opd_qwen3.yaml").read_text()
    assert len(example.splitlines()) <= 25
    config = load_workflow(ROOT / "configs/opd_qwen3.yaml")
    assert config.stages["opd"].kl_estimator == "full_vocab" and config.arms["after"] == "opd"


def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["stages.svg", "quickstart.svg", "layers.svg"])
def test_figures_are_what_the_script_draws(name):
    drawn = figures().FIGURES[name]()
    assert drawn == (ROOT / "docs/figures" / name).read_text(encoding="utf-8"), "run python docs/figures/figures.py"


def test_the_reference_of_keys_is_that_of_the_classes():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert module.reference() == page, "run python docs/reference.py"
    for key in ("threads_per_rank", "tracking", "lr_schedule", "grad_clip", "stop_strings"):
        assert f"| `{key}` |" in page


def test_the_same_checks_run_by_hand_before_a_commit_and_in_continuous_integration():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        assert f"\n{hook['entry'].removeprefix('make ')}: $(DEV)\n" in makefile
    assert " ".join(hook["entry"].removeprefix("make ") for hook in hooks) in makefile  # what `make check` runs
    assert "make -k check test" in (ROOT / ".ci/run").read_text()


def slug(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_links_resolve(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            broken.append(target)
    assert not broken


@functools.cache
def words_of_the_code() -> set[str]:
    words = set()
    for path in repository_files():
        words |= set(re.findall(r"\w+", path.stem)) | {path.stem.replace("-", "_")}
        if path.suffix != ".md" and path.name not in ("migration.py", "test_documents.py", "test_migration.py"):
            words |= set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", path.read_text()))
    return words


@functools.cache
def repository_files() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return [*inside, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile", ROOT / ".ci/run"]


def code_spans(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


# Options of SGLang, a letter of the shapes legend, an argument.
EXTERNAL = {"torch_native", "return_hidden_states", "v_tp", "HF_DIR"}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=document_id)
def test_names_in_documents_exist(path):
    """Words with an underscore or a capital inside are names: of a key, a metric, a function, a class, a stage."""
    name = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)+|[A-Z][a-z]+(?:[A-Z][a-z]+)+")
    missing = {
        word
        for span in code_spans(path)
        if not re.search(r"[=(*]|http|^(make|pip|python|s2d) ", span)
        for word in name.findall(span)
        if word not in words_of_the_code() | EXTERNAL
    }
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_paths_in_documents_exist(path):
    roots = (ROOT, ROOT / "megatron_s2d", path.parent)
    file = re.compile(r"^[\w.-]+(?:/[\w.*-]+)*(?:/|\.(?:py|md|sh|toml|txt))$|^(?:configs|tests|docs)/[\w./*-]+$")
    missing = [
        span
        for span in code_spans(path)
        if file.match(span) and not span.startswith(GENERATED) and not any(any(root.glob(span)) for root in roots)
    ]
    assert not missing


# What a run, a launch or a conversion writes, and folders of a user.
GENERATED = (
    "real-model/", "runs/", "RUN_DIR/", "stages/", "checkpoints/", "hf/", "plots/", "models/", "data/", "shared/",
    "report.md", "log.txt", "rank.sh", "rankN-", "HOST-", "example.py",
)  # fmt: skip


# Keys that were renamed and whose last part is still the name of something else, or an English word.
REUSED = {
    "aggregation", "ahead", "arguments", "attempts", "base", "batch_size", "concurrency", "deterministic", "fallback",
    "frozen_models", "gate", "gates", "importance", "keep", "kind", "like", "max_kl", "max_tokens", "num_workers",
    "overlong", "packed", "recoveries", "release_memory", "replicas", "start_seconds", "support", "sync", "tail",
    "tensorboard",
}  # fmt: skip
RENAMED_IN_CODE = """
    Deal UpdateBatch WaitingStates HostRows _Journeys travelling_rows by_predictor policy_spans Fleet BadReply
    ShortContext GivenResponses GradedGroups StudentResponses ScoredResponses ByDomain PromptStream GateConfig
    Parking at_hand restart_schedule_at accumulate_in_products host_empty stacks_left whole_multiple
    tensor_rank tensor_size data_rank data_size context_rank context_size pipeline_rank pipeline_size
    is_first_stage is_last_stage layers_of_stage last_stage_ranks sees_tokens is_leader is_writer
    query_size kv_size from_first from_all score_longest _odd_digests
    rollout_gap_mean rollout_gap_max rollout_gap_at rollout_kl probe_gap push_gb_per_second seconds_samples
    seconds_push kl_at gate_conflict_at zeroed_gradient anchor_kept samples_drawn
    cpu_stand_in plan_cost
"""


def renamed_words() -> list[str]:
    keys = {key.rpartition(".")[2] for table in (WORKFLOW_KEYS, SWEEP_KEYS, SIMULATION_KEYS) for key in table}
    return sorted(keys - REUSED | set(re.findall(r"\w+", RENAMED_IN_CODE)))


def test_no_old_names():
    """Names that were replaced occur in the migration table, its test and the changelog only."""
    old = re.compile(rf"(?<![\w])({'|'.join(map(re.escape, renamed_words()))})(?![\w])")
    allowed = {"migration.py", "test_migration.py", "test_documents.py", "CHANGELOG.md"}
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {match[1]}"
        for path in repository_files()
        if path.name not in allowed
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in old.finditer(line)
    ]
    assert not hits
