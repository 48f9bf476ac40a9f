"""A paper's table: cells, averages, the comparison of orders, and tables that do not fit the workflow."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.report.evaluation import evaluation_from_rows, paired_comparison, pass_at_k
from megatron_s2d.report.paper_table import make_table

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
TABLE = {
    "title": "a table",
    "paper_columns": ["X", "Y"],
    "columns": [
        {"label": "one", "prompts": "problems", "paper": "X", "group": "sums"},
        {"label": "two", "prompts": "others", "metric": "pass", "group": "products"},
        {"label": "mean", "average": ["one", "two"], "paper": "Y", "group": "sums"},
    ],
    "rows": [
        {"label": "best", "arm": "a", "paper": [3.0, 1.0]},
        {"label": "mixed", "arm": {"sums": "b", "products": "a"}, "paper": [2.0, 2.0]},
        {"label": "worst", "arm": "b", "paper": [1.0, None]},
        {"label": "unknown", "arm": None, "paper": [4.0, 4.0], "note": "not run"},
    ],
}


def workflow(folder, **changes):
    data = {"others": {"type": "task", "split": "heldout", "num_operations": 2, "num_prompts": 8}}
    document = {
        "defaults": str(SMOKE),
        "data": data,
        "arms": {"a": "opd", "b": "forward_kl"},
        "contrasts": [],
        "evaluation": {"prompts": ["problems", "others"]},
        "table": TABLE | changes,
    }
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_workflow(path)


def evaluation(rewards):
    """Four problems with two samples each, two of them in the second domain with four."""
    rows = []
    for index, samples in enumerate(rewards):
        rows.append(
            {
                "problem_id": f"p{index}",
                "domain": "first" if index < 4 else "second",
                "rewards": samples,
                "response_lengths": [10 * index + sample for sample in range(len(samples))],
                "finish_reasons": ["stop"] * len(samples),
            }
        )
    return evaluation_from_rows(rows, "test")


GOOD = [[1, 1], [1, 1], [1, 1], [1, 1], [1, 1, 0, 0], [0, 0, 0, 1]]
BAD = [[0, 0], [0, 0], [0, 0], [0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
PROBLEMS = {"problems": ["p0", "p1", "p2", "p3"], "others": ["p4", "p5"]}


def test_lengths_of_responses_are_means_over_problems(tmp_path):
    columns = [
        {"label": "one", "prompts": "problems", "metric": "length"},
        {"label": "two", "prompts": "others", "metric": "length"},
        {"label": "mean", "average": ["one", "two"], "metric": "length"},
    ]
    rows = [{"label": "a", "arm": "a", "paper": [None, None]}]
    config = workflow(tmp_path, columns=columns, rows=rows)
    table = make_table(config, {"opd": evaluation(GOOD), "forward_kl": evaluation(BAD)}, PROBLEMS)
    # Problems 0 to 3 have two responses of 10 n and 10 n + 1 tokens, 4 and 5 four of 10 n to 10 n + 3.
    first, second = [0.5, 10.5, 20.5, 30.5], [41.5, 51.5]
    errors = [np.std(values, ddof=1) / len(values) ** 0.5 for values in (first, second)]
    assert table.rows[0][3:] == [
        f"{np.mean(first):.1f} ± {errors[0]:.1f}",
        f"{np.mean(second):.1f} ± {errors[1]:.1f}",
        f"{(np.mean(first) + np.mean(second)) / 2:.1f} ± {np.hypot(*errors) / 2:.1f}",
    ]
    assert not table.agreements


def test_cells_and_orders(tmp_path):
    table = make_table(workflow(tmp_path), {"opd": evaluation(GOOD), "forward_kl": evaluation(BAD)}, PROBLEMS)
    assert table.header == ["", "X (paper)", "Y (paper)", "one", "two", "mean"]
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells["best"] == ["3.0", "1.0", "100.0 ± 0.0", "100.0 ± 0.0", "68.8 ± 6.2"]
    assert cells["mixed"][2:4] == ["12.5 ± 12.5", "100.0 ± 0.0"]
    assert cells["worst"][1] == "" and cells["unknown (not run)"][2:] == ["–", "–", "–"]
    by_column = {agreement.column: agreement for agreement in table.agreements}
    assert set(by_column) == {"one", "mean"}  # pass@k is shown, not ordered
    assert (by_column["one"].agree, by_column["one"].undecided, by_column["one"].against) == (2, 1, 0)
    assert (by_column["mean"].agree, by_column["mean"].against) == (0, 1)
    assert "2 in the paper's order, 0 in the other, 1 too close" in by_column["one"].sentence


def test_problems_with_several_numbers_of_samples():
    good, bad = evaluation(GOOD), evaluation(BAD)
    assert good.k == 2 and good.counts.tolist() == [2, 2, 2, 2, 4, 4]
    assert paired_comparison(good, bad).difference == pytest.approx((1 + 1 + 1 + 0.5 + 0.5 + 0) / 6)
    # pass@2 of two right in four is 1 - C(2,2)/C(4,2), of one right 1 - C(3,2)/C(4,2)
    assert pass_at_k(good, [2])[2].mean == pytest.approx((4 + (1 - 1 / 6) + (1 - 3 / 6)) / 6)
    with pytest.raises(UserError, match="evaluate both with the same k"):
        paired_comparison(good, evaluation([samples[:2] for samples in BAD]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"label": "r", "arm": "c", "paper": [1, 2]}]}, "names the arm 'c'"),
        ({"rows": [{"label": "r", "arm": "a", "paper": [1]}]}, "has 1 figures and paper_columns 2"),
        ({"rows": [{"label": "r", "arm": {"sums": "a"}, "paper": [1, 2]}]}, "an arm for each group"),
        ({"columns": [{"label": "one", "prompts": "pool"}], "rows": TABLE["rows"][:1]}, "not among evaluation.prompts"),
        ({"columns": [{"label": "one", "paper": "Z"}]}, "not among paper_columns"),
        ({"columns": [{"label": "one"}, {"label": "one"}]}, "the same label"),
        ({"columns": [{"label": "m", "average": ["x"]}]}, "averages 'x'"),
        ({"columns": [{"label": "m", "average": ["x"], "prompts": "problems"}]}, "not both"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        workflow(tmp_path, **changes)
