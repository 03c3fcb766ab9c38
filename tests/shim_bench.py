"""What limits cost at the start of a command: `python -m tests.shim_bench`."""

from __future__ import annotations

import time

from upq.spawn import Limits, start

ROUNDS = 100


def mean_ms(limits: Limits) -> float:
    began_s = time.perf_counter()
    for _ in range(ROUNDS):
        start(["true"], limits, {}).wait()
    return (time.perf_counter() - began_s) / ROUNDS * 1000


def main() -> None:
    for name, limits in {
        "no limits": Limits(),
        "limits": Limits(nice=5, memory_bytes=1 << 30, cpu_s=60),
        "limits and ionice": Limits(nice=5, memory_bytes=1 << 30, cpu_s=60, ionice="idle"),
    }.items():
        print(f"{name:20} {min(mean_ms(limits) for _ in range(3)):6.2f} ms")


if __name__ == "__main__":
    main()
