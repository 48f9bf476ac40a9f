"""Every ``s2d`` command in README, docs, config comments, Makefile and ``--help`` parses and names what exists.

Rules for whoever writes such a command:

- In a code block the command ends at two spaces or at `` #``; a description may follow. ``\\`` at the end of a line
  continues it. In running text the command stands in backticks and may leave required arguments out.
- Placeholders are words in capitals (``CONFIG``, ``RUN_DIR``, ``N``, ``NAME=VALUE``) and the reader's own files
  (``my*.yaml``, ``cluster.yaml``, ``workflow.json``). Everything else must exist: config files, stages, arms, data
  entries and the keys of ``--set`` (for a reader's own file those of ``configs/smoke.yaml``).
- ``[--option VALUE]`` is optional, ``a|b`` means either, and ``...`` stands for any further arguments.
- A run directory is ``runs/NAME`` with the ``name`` of a shipped config, or the ``--out`` of another command.
"""

import argparse
import contextlib
import functools
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_s2d.cli import build_parser, main
from megatron_s2d.config.sweep import load_sweep
from megatron_s2d.config.workflow import WorkflowConfig, load_workflow
from megatron_s2d.launchers.config import load_launch
from megatron_s2d.studies.simulate import load_simulation
from megatron_s2d.workflow import generate
from megatron_s2d.workflow.plan_estimate import machine_from_options

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*(=[A-Z_]+)?|my\w*\.yaml|cluster\.yaml|workflow\.json")
NUMBERS = {"N": "1", "K": "1"}  # placeholders of whole numbers
IN_CODE = re.compile(r"(?:^(?:# *)?|/)s2d (.+)|-m megatron_s2d\.cli (.+)")
IN_TEXT = re.compile(r"`s2d ([^`]+)`")
# What a command in running text may leave out: name of the argument -> a value.
OMITTED = {"launcher": "local", "action": "info", "convert_action": "inspect"}


def code_commands(lines: list[str]) -> Iterator[str]:
    """Commands in the lines of a code block."""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        match = IN_CODE.search(line.strip())
        if match:
            yield re.split(r"\s#| {2,}", re.sub(r" +(?=--)", " ", match[1] or match[2]))[0]


def markdown_commands(text: str) -> Iterator[tuple[str, bool]]:
    """(command, whether it may leave arguments out) of a page."""
    code, prose, fenced = [], [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        else:
            (code if fenced or line.startswith("    ") else prose).append(line)
    yield from ((command, False) for command in code_commands(code))
    yield from ((" ".join(command.split()), True) for command in IN_TEXT.findall("\n".join(prose)))


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from all_parsers(child)


def documented_commands() -> Iterator[tuple[str, str, bool]]:
    """(where, command without ``s2d``, whether it may leave arguments out)."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for command, in_text in markdown_commands(path.read_text(encoding="utf-8")):
            yield str(path.relative_to(ROOT)), command, in_text
    for path in [ROOT / "Makefile", *ROOT.glob("configs/**/*.yaml")]:
        for command in code_commands(path.read_text(encoding="utf-8").splitlines()):
            yield str(path.relative_to(ROOT)), command, False
    for parser in all_parsers(build_parser()):
        for command in code_commands((parser.epilog or "").splitlines()):
            yield f"{parser.prog} --help", command, False


def alternatives(command: str) -> Iterator[list[str]]:
    """Arguments of every reading of a command."""
    command = re.sub(r"\[(--[^\]]*)\]", r"\1", command.replace(" | ", "|"))
    choices = [[word] if " " in word else word.split("|") for word in shlex.split(command) if word != "..."]
    for words in itertools.product(*choices):
        yield [NUMBERS.get(word, word) for word in words]


def parse(arguments: list[str], in_text: bool) -> argparse.Namespace:
    """Parse; in running text, required arguments that are left out get a value."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return build_parser().parse_args(arguments)
    except SystemExit:
        missing = re.search(r"arguments are required: (.*)|(expected one argument)", errors.getvalue())
        if not (in_text and missing):
            pytest.fail(errors.getvalue())
    names = (missing[1] or missing[2]).split(", ")
    return parse([*arguments, *(OMITTED.get(name, "NAME") for name in names)], in_text)


COMMANDS = list(documented_commands())


@functools.cache
def output_directories() -> set[Path]:
    """What the commands in code blocks write with ``--out``."""
    parsed = (parse(words, True) for _, command, in_text in COMMANDS if not in_text for words in alternatives(command))
    return {options.out for options in parsed if getattr(options, "out", None)}


@functools.cache
def config_of_run(name: str) -> WorkflowConfig | None:
    """The shipped config whose run directory is ``runs/NAME``."""
    path = ROOT / "configs" / f"{name}.yaml"
    return load_workflow(path) if path.exists() else None


def check_config(options: argparse.Namespace) -> None:
    is_placeholder = PLACEHOLDER.fullmatch(options.config.name)
    path = ROOT / ("configs/smoke.yaml" if is_placeholder else options.config)
    overrides = [item for item in options.overrides if not PLACEHOLDER.fullmatch(item)]
    config = load_workflow(path, overrides)
    stage = getattr(options, "stage", None)
    assert stage is None or PLACEHOLDER.fullmatch(stage) or stage in config.stages


def check_run_path(path: Path) -> WorkflowConfig | None:
    """Check a run directory or a path inside one; return the config of the run if it is shipped."""
    if PLACEHOLDER.fullmatch(path.parts[0]):
        return None
    assert path.parts[0] == "runs", f"{path} is no run directory"
    config = config_of_run(path.parts[1])
    assert config is not None or Path(*path.parts[:2]) in output_directories(), f"no config writes {path}"
    if config is not None and len(path.parts) > 3 and path.parts[2] == "stages":
        stage = config.stages[path.parts[3]]
        if path.parts[4:] == ("cache",):
            assert stage.type == "teacher_cache"
    return config


def check_stage_or_arm(config: WorkflowConfig | None, name: str | None) -> None:
    if config is not None and name is not None and not PLACEHOLDER.fullmatch(name):
        assert name in config.arms or name in config.stages, f"the run has no stage or arm '{name}'"


def check_names(options: argparse.Namespace) -> None:
    """Check that what a command names exists."""
    if "config" in options:
        check_config(options)
    if options.command == "sweep" and not PLACEHOLDER.fullmatch(options.sweep.name):
        load_sweep(ROOT / options.sweep)
    if options.command == "simulate" and not PLACEHOLDER.fullmatch(options.simulation.name):
        load_simulation(ROOT / options.simulation)
    if "gpu" in options and options.gpu != "NAME":
        assumptions = [item for item in getattr(options, "assume", []) if not PLACEHOLDER.fullmatch(item)]
        machine_from_options(options.gpu, options.num_gpus, assumptions)
    if "cluster_overrides" in options:
        load_launch(None, [item for item in options.cluster_overrides if not PLACEHOLDER.fullmatch(item)])
    if "run_dir" in options:
        config = None if options.run_dir is None else check_run_path(options.run_dir)  # eval --model has none
        for name in (getattr(options, key, None) for key in ("arm", "against_arm", "stage")):
            check_stage_or_arm(config, name)
        if config is not None and getattr(options, "data", None) is not None:
            assert options.data in config.data
    if getattr(options, "against", None) is not None:
        check_stage_or_arm(check_run_path(options.against), options.against_arm or options.arm)
    for key in ("directory", "megatron_directory"):
        path = getattr(options, key, None)
        if path is not None and Path(path).parts[0] == "runs":
            check_run_path(Path(path))


@pytest.mark.parametrize(("where", "command", "in_text"), COMMANDS, ids=[f"{c[0]}: {c[1]}" for c in COMMANDS])
def test_documented_command_parses_and_names_what_exists(where, command, in_text):
    for arguments in alternatives(command):
        check_names(parse(arguments, in_text or "..." in command))


def test_commands_are_extracted_from_every_kind_of_document():
    code = "    s2d run a.yaml \\\n      --dry-run   checks\n\n```\ntorchrun -m megatron_s2d.cli run b\n```\n"
    page = f"Use `s2d eval\nRUN_DIR`:\n\n{code}"
    assert list(markdown_commands(page)) == [("run a.yaml --dry-run", False), ("run b", False), ("eval RUN_DIR", True)]
    assert list(alternatives("cache info|verify DIR [--debug] ...")) == [
        ["cache", "info", "DIR", "--debug"],
        ["cache", "verify", "DIR", "--debug"],
    ]
    sources = {where for where, _, _ in COMMANDS}
    assert sources >= {"README.md", "docs/launch.md", "Makefile", "configs/smoke.yaml", "s2d generate --help"}


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("run configs/quickstart.yaml --set stages.opd.optimizer.lr=1", "stages.opd"),
        ("run configs/missing.yaml", "missing.yaml"),
        ("generate runs/quickstart opd_rl_teacher --prompt x", "opd_rl_teacher"),
        ("cache verify runs/quickstart/stages/cache_rl_teacher/cache", "cache_rl_teacher"),
    ],
)
def test_check_notices_names_that_do_not_exist(command, error):
    with pytest.raises(Exception, match=error):
        check_names(parse(shlex.split(command), False))


@pytest.mark.parametrize("parser", all_parsers(build_parser()), ids=lambda parser: parser.prog)
def test_help_shows_examples_and_describes_every_argument(parser):
    assert any(code_commands((parser.epilog or "").splitlines())), "no example"
    described = [action.help for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    assert all(described)
    for override in re.findall(r"--set (\S+=[^\s;]+)", "\n".join(described)):
        load_workflow(ROOT / "configs/quickstart.yaml", [override])


def test_generate_passes_every_option_on(monkeypatch):
    requests = []
    monkeypatch.setattr(generate, "generate", lambda request, console: requests.append(request))
    options = "--data problems --limit 3 --num-samples 2 --temperature 0 --max-response-length 8 --seed 5"
    assert main(["generate", "runs/quickstart", "opd_rl", *options.split()]) == 0
    assert requests == [generate.GenerateRequest(Path("runs/quickstart"), "opd_rl", (), "problems", 3, 2, 0.0, 8, 5)]
