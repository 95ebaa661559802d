"""Prints name==version for every installed distribution that a requirements file needs, itself included."""

from __future__ import annotations

import importlib.metadata as metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement


def read(path: Path) -> list[Requirement]:
    found = []
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found += read(path.parent / line[3:].strip())
        elif line:
            found.append(Requirement(line))
    return found


def main() -> None:
    pins: dict[str, str] = {}
    queue = read(Path(sys.argv[1]))
    while queue:
        requirement = queue.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})
        ):
            continue
        key = requirement.name.lower().replace("_", "-")
        distribution = metadata.distribution(requirement.name)
        if key in pins and not requirement.extras:
            continue
        pins[key] = distribution.version.split("+")[0]
        for text in distribution.requires or ():
            dependency = Requirement(text)
            extras = requirement.extras or {""}
            marker = dependency.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                dependency.marker = None
                queue.append(dependency)
    sys.stdout.write("".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))


if __name__ == "__main__":
    main()
