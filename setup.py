"""The import package `gptoss` is src/; configs/ and assets/ travel inside it. The rest is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

DATA = [folder for top in ("configs", "assets") for folder in (Path(top), *Path(top).rglob("*")) if folder.is_dir()]
data = {f"gptoss.{'.'.join(folder.parts)}": str(folder) for folder in DATA}
HEADING = "# --- extra "


def read_requirements(name: str) -> dict[str, list[str]]:
    """Returns a requirements file's lines by the extra that they stand under; those before any heading under ""."""
    found: dict[str, list[str]] = {"": []}
    extra = ""
    for line in Path(name).read_text().splitlines():
        if line.startswith(HEADING):
            extra = line.removeprefix(HEADING).partition(":")[0]
            found[extra] = []
        elif line and not line.startswith(("#", "-r ")):
            found[extra].append(line)
    return found


runtime = read_requirements("requirements.txt")
tracing = read_requirements("requirements-tracing.txt")[""]
evaluations = read_requirements("requirements-eval.txt")[""]
replicas = read_requirements("requirements-ray.txt")[""]
dev = [*(line for name, lines in runtime.items() if name for line in lines), *tracing]
dev += read_requirements("requirements-dev.txt")[""]

setup(
    packages=["gptoss", *(f"gptoss.{name}" for name in find_packages("src")), *data],
    package_dir={"gptoss": "src", **data},
    include_package_data=True,  # MANIFEST.in
    install_requires=runtime[""],
    extras_require={
        **{name: lines for name, lines in runtime.items() if name not in ("", "dev")},
        "tracing": tracing,
        "eval": evaluations,
        "ray": replicas,
        "dev": dev,
    },
)
