"""Laws of the account: no time is lost or counted twice, whatever is nested and whatever fails."""

import json
import subprocess
import sys

import numpy as np
import pytest

from sora_jax.train import goodput


class Clock:
    """Nanoseconds that pass only when told to."""

    now = 0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += int(seconds * 1e9)


@pytest.fixture
def clock():
    return Clock()


def test_causes_sum_to_the_wall_time_and_the_inner_one_counts(clock):
    account = goodput.Account(clock)
    clock.tick(40)
    account.turn("step")
    clock.tick(3)
    with account.of("evaluate"):
        clock.tick(5)
        with account.of("save"):
            clock.tick(7)
        clock.tick(11)
    with pytest.raises(KeyboardInterrupt), account.of("sample"):
        clock.tick(2)
        raise KeyboardInterrupt
    account.turn("lost")
    clock.tick(13)
    spent = account.spent()
    assert {name: value / 1e9 for name, value in spent.items() if value} == {
        "start": 40,
        "step": 3,
        "evaluate": 16,
        "save": 7,
        "sample": 2,
        "lost": 13,
    }
    assert sum(spent.values()) == clock.now


def test_real_time_sums_to_the_nanosecond():
    times = []

    def clock():
        times.append(goodput.time.perf_counter_ns())
        return times[-1]

    account = goodput.Account(clock)
    for cause in list(goodput.CAUSES) * 20:
        with account.of(cause):
            sum(range(100))
    assert sum(account.spent().values()) == times[-1] - times[0]


def test_the_sentence_says_where_time_went(clock):
    spent = dict.fromkeys(goodput.CAUSES, 0) | {"step": 626, "start": 40, "save": 20, "lost": 68}
    text = goodput.sentence({name: int(seconds * 1e9) for name, seconds in spent.items()})
    assert text == "goodput 83 % of 12:34: steps 10:26, steps done again 01:08, start 00:40, saves 00:20"


def test_laps_are_all_of_steps_and_their_data_and_nothing_else(clock):
    account = goodput.Account(clock)
    laps = goodput.Laps(account)
    clock.tick(100)  # the compilation
    account.turn("step")
    laps.begin()
    for number in range(1, 11):
        with account.of("data"):
            clock.tick(0.25)
        clock.tick(number)
        laps.step()
        with account.of("save"):
            clock.tick(50)
    clock.tick(0.5)  # the log line waits for the devices
    seconds = laps.close()
    assert seconds == [number + 0.25 for number in range(1, 10)] + [10.75]
    spent = account.spent()
    assert sum(seconds) * 1e9 == spent["step"] + spent["data"]
    assert laps.close() == []


def test_percentiles():
    seconds = np.random.default_rng(0).permutation(np.arange(101.0)).tolist()
    found = goodput.percentiles(seconds)
    assert found == {
        "step_seconds/p50": 50,
        "step_seconds/p90": 90,
        "step_seconds/p99": 99,
        "step_seconds/max": 100,
    }
    assert goodput.percentiles([]) == {}


# In a process of its own: in that of many tests, what earlier ones held is given back at any moment.
MEMORY = """
import json
import numpy as np
from sora_jax.train import goodput
told = [goodput.memory()]
held = np.ones(200_000_000, np.uint8)
told.append(goodput.memory())
del held
print(json.dumps([*told, goodput.memory()]))
"""


def test_memory_is_of_this_process():
    told = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    before, during, after = json.loads(told)
    assert "memory/device" not in before  # CPUs do not tell
    assert during["memory/host"] - before["memory/host"] > 0.9 * 200_000_000
    assert after["memory/host"] < during["memory/host"] <= 1.01 * after["memory/host_peak"]


def test_memory_of_devices_is_of_the_fullest(monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used}

    monkeypatch.setattr(goodput.jax, "local_devices", lambda: [Device(3), Device(5)])
    found = goodput.memory()
    assert found["memory/device"] == 5 and found["memory/device_peak"] == 10
