"""Every small file that explodes (`hostile.explosions`), once, through the command line: refused in one line, each.

python tests/hostile/explode.py [--templates]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.explosions import EXPLOSIONS
from hostile.fuzz import Sandbox
from hostile.process import prepare
from hostile.strategies import Case


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--templates", action="store_true", help="the chat templates too")
    asked = options.parse_args()
    prepare()
    folder, counts, findings = Path(tempfile.mkdtemp(prefix="vlmguard-explode-")), Counter[str](), []
    try:
        sandbox = Sandbox(folder)
        for target, kinds in EXPLOSIONS.items():
            for (name, kind), content in kinds.items():
                if name == "chat_template.jinja" and not asked.templates:
                    continue
                case = Case(target, 0, name, "steer", (f"explode: {kind}",), content(), 0)
                outcome = sandbox.outcome(case, folder / "keep")
                counts[outcome.kind] += 1
                if outcome.kind != "refused":
                    findings.append(f"{case!r}: {outcome.kind}: {outcome.detail}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{sum(counts.values())} cases: {dict(counts)}; {len(findings)} findings", *findings, sep="\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
