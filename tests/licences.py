"""No dependency may carry a licence that reaches into the code of those who use us (GPL, AGPL).

Run as `python -m tests.licences`. LGPL is fine: it is linked, not copied.
"""

import json
import re
import subprocess
import sys

FORBIDDEN = re.compile(r"(?<!L)(?<!Lesser )(?<!Library )\bA?GPL|Affero|GNU General Public", re.IGNORECASE)
OR_ANOTHER = re.compile(r"\bOR\b")
"""A choice of licences, as SPDX writes it. A list (";") is no choice: all of it holds."""
FINE = re.compile(r"MIT|BSD|Apache|PSF|Python|ISC|MPL|Mozilla|Zlib|LGPL|Lesser|Unlicense|HPND", re.IGNORECASE)


def installed() -> list[dict[str, str]]:
    """Name, version and licence of every installed package."""
    command = [sys.executable, "-m", "piplicenses", "--format=json", "--from=mixed"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def forbidden(licence: str) -> bool:
    """Whether a licence text names GPL or AGPL and offers nothing else."""
    if not FORBIDDEN.search(licence):
        return False
    return not (OR_ANOTHER.search(licence) and FINE.search(licence))


def main() -> int:
    packages = installed()
    wrong = [p for p in packages if forbidden(p["License"])]
    for package in wrong:
        print(f"{package['Name']} {package['Version']}: {package['License']}")
    print(f"{len(packages)} packages, {len(wrong)} with a forbidden licence")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
