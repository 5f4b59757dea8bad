"""Says whether logs of real processes are united to what one process captures, in one line."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "capture"), str(TESTS), str(TESTS / "archive")]


def merged_equals_oracle() -> str:
    """Run four processes in each way, unite their logs, and compare every value.

    Returns
    -------
    str
        What was compared.

    Raises
    ------
    AssertionError
        Something differs.
    """
    import processes
    import test_processes as checks

    with tempfile.TemporaryDirectory() as folder:
        ran = processes.run(Path(folder))
        for number, check in enumerate(
            (
                checks.test_data_parallel_logs_are_united_to_one_process_logs,
                checks.test_stages_of_a_pipeline_are_united_to_one_process_log,
                checks.test_divided_outputs_are_put_together_by_what_weights_say,
                checks.test_a_mesh_of_two_axes_is_united,
                checks.test_a_model_that_transformers_divides_is_united,
                checks.test_a_killed_process_is_named_and_goes_on,
            )
        ):
            place = Path(folder, str(number))
            place.mkdir()
            check(ran, place)
    return (
        "merged equals the single-process oracle bit for bit: DP 4, PP 4; and the processes' own "
        "tensors: TP 4, DP 2 × TP 2, PP 2 × TP 2; one of 4 killed and resumed"
    )


if __name__ == "__main__":
    print(merged_equals_oracle())
