"""`python -m tests.fuzz.service NAME --inputs N --seed N`: one service under hostile frames; the last line is JSON."""

import argparse
import json
import logging

from tests.fuzz.services import GROWTH_MIB_MAX, SERVICES, memory_mib, run_service

WARM_UP_SHARE = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(SERVICES))
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    _, findings = run_service(arguments.name, max(1, arguments.inputs // WARM_UP_SHARE), arguments.seed)
    before_mib = memory_mib()
    attack, more = run_service(arguments.name, arguments.inputs, arguments.seed + 1)
    findings += more
    grown = memory_mib() - before_mib
    if grown > GROWTH_MIB_MAX:
        findings.append(f"memory grew by {grown} MiB")
    sent = 0 if attack is None else attack.sent
    print(json.dumps({"inputs": sent, "peak_mib": memory_mib(), "findings": sorted(set(findings))}))


if __name__ == "__main__":
    main()
