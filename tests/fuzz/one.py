"""`python -m tests.fuzz.one TARGET --runs N --seconds S --seed N --artifacts DIR`: one target under atheris.

Place      a process of its own: libFuzzer ends it when it is done, or with the first finding, whose input it leaves
           in the directory. A hang and memory without bound are findings as well.
"""

import argparse
import sys

import atheris

with atheris.instrument_imports(include=["csvfs", "coordinator"]):
    from tests.fuzz.targets import MEMORY_MIB_MAX, SECONDS_MAX, SIZE_MAX, TARGETS, quiet


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", required=True)
    arguments = parser.parse_args()
    quiet()
    options = [
        sys.argv[0], arguments.corpus, f"-runs={arguments.runs}", f"-max_total_time={arguments.seconds}",
        f"-seed={arguments.seed}", f"-max_len={SIZE_MAX + 16}", f"-timeout={SECONDS_MAX}", f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-artifact_prefix={arguments.corpus}/finding-", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup(options, TARGETS[arguments.target].try_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
