import io
import os
import time

import pytest
import torch
from tqdm import tqdm

from dtlib.workers import in_threads, spread


def test_one_process_does_it_here():
    bar, seen = tqdm(total=6, file=io.StringIO()), []

    def job(item, device, on_steps):
        on_steps(item)
        seen.append((item, device, os.getpid()))
    spread(job, [1, 2, 3], "cpu", 1, bar)
    assert seen == [(item, "cpu", os.getpid()) for item in (1, 2, 3)] and bar.n == 6


def test_more_processes_than_cards_are_not_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen = []
    spread(lambda item, device, on_steps: seen.append((item, os.getpid())), [1, 2], "cuda", 2, tqdm(file=io.StringIO()))
    assert seen == [(1, os.getpid()), (2, os.getpid())]


def test_threads_keep_the_order_and_have_one_core_each():
    before = torch.get_num_threads()

    def job(number):
        time.sleep(0.02 * (number == 0))  # the first ends last
        return number, torch.get_num_threads()

    try:
        torch.set_num_threads(2)
        assert in_threads(job, range(4), "cpu") == [(number, 1) for number in range(4)]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            in_threads(lambda number: 1 / number, [1, 0], "cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
