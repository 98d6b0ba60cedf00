import pytest

from maskmoe.data.parallel import map_in_processes
from maskmoe.errors import UserError


def fail_at_three(number: int) -> int:
    if number == 3:
        raise UserError("task 3 failed")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_keep_the_order_of_the_tasks(workers: int) -> None:
    assert list(map_in_processes(abs, range(-50, 0), workers)) == list(range(50, 0, -1))
    assert list(map_in_processes(abs, [], workers)) == []


def test_reading_stays_a_few_tasks_ahead_of_the_results() -> None:
    taken: list[int] = []
    tasks = (taken.append(number) or number for number in range(1000))
    results = map_in_processes(abs, tasks, 2)
    assert next(results) == 0
    assert len(taken) < 40
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_a_task_is_raised_in_its_place(workers: int) -> None:
    results = map_in_processes(fail_at_three, range(10), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="task 3 failed"):
        next(results)
